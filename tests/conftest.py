"""What holds for every test: no test asserts a time, so generated cases have no deadline either."""

from hypothesis import settings

settings.register_profile("moesaic", deadline=None)
settings.load_profile("moesaic")
