"""RouterConfig, RuntimeConfig, MigrationConfig and DebugConfig: choices, and the old names of options that have new ones."""

import copy
import pickle
import re
import typing
import warnings
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from moesaic import DebugConfig, MigrationConfig, RouterConfig, RuntimeConfig
from moesaic.collectives import SCHEDULES, TRANSPORTS
from moesaic.runtime.moved_options import MOVED, MovedOptionWarning
from tests.helpers.configs import MOVED_VALUES, moved_config

DEFAULTS = {field.name: field.default for field in fields(DebugConfig)}
EACH_MOVED = pytest.mark.parametrize("name,value", MOVED_VALUES.items(), ids=MOVED_VALUES)


def choices_of(kind: type, name: str) -> tuple[Any, ...]:
    return typing.get_args(typing.get_type_hints(kind)[name])


def choice_fields() -> list[tuple[str, type, str]]:
    """(section, class, field) of every field whose annotation lists its values."""
    kinds = {
        "router": RouterConfig,
        "runtime": RuntimeConfig,
        "runtime.migration": MigrationConfig,
        "runtime.debug": DebugConfig,
    }
    return [
        (section, kind, name)
        for section, kind in kinds.items()
        for name, hint in typing.get_type_hints(kind).items()
        if typing.get_origin(hint) is typing.Literal
    ]


@pytest.mark.parametrize("section,kind,name", choice_fields(), ids=lambda part: part if isinstance(part, str) else part.__name__)
def test_choices_are_those_of_the_annotation(section: str, kind: Any, name: str) -> None:
    """Each of them is taken; any other value is a line that lists them."""
    choices = choices_of(kind, name)
    for choice in choices:
        needed = {"slot_bytes": 1} if kind is RuntimeConfig else {}
        assert getattr(kind(**needed, **{name: choice}), name) == choice
    with pytest.raises(ValueError) as refused:
        kind(**{name: "x"})
    listed = " or ".join([", ".join(map(repr, choices[:-1])), repr(choices[-1])])
    assert str(refused.value) == f"{section}.{name} is 'x'; choose {listed}"


def test_choices_are_what_there_is_to_choose() -> None:
    assert len(choice_fields()) == 3 + 3 + 1 + 6
    assert choices_of(DebugConfig, "schedule") == ("auto", *SCHEDULES)
    assert choices_of(RuntimeConfig, "transport") == ("auto", *TRANSPORTS)


def test_what_moved() -> None:
    """These eleven, all but one to `debug`; an old name is no field, and nothing that is compared or printed."""
    assert {f"runtime.{name}" for name in MOVED_VALUES} == MOVED.keys() - {"runtime.debug.rehome_effort"}
    sections = (("debug", DebugConfig), ("migration", MigrationConfig))
    new = {f"runtime.{section}.{field.name}" for section, kind in sections for field in fields(kind)}
    assert new - {"runtime.migration.solver", "runtime.migration.time_limit_s"} == set(MOVED.values())
    assert not {field.name for field in fields(RuntimeConfig)} & MOVED_VALUES.keys()
    assert all(moved_config(name, value) != RuntimeConfig() for name, value in MOVED_VALUES.items())


@EACH_MOVED
def test_an_old_name_means_the_new_one(name: str, value: Any) -> None:
    """As an argument, in `replace` and as an attribute, each time with one warning that names the new one."""
    expected, message = moved_config(name, value, slots=1), rf"^runtime\.{name} is now {re.escape(MOVED[f'runtime.{name}'])};"
    with pytest.warns(DeprecationWarning, match=message) as seen:
        made = RuntimeConfig(slots=1, **{name: value})
    assert [warning.filename for warning in seen] == [__file__]
    with pytest.warns(DeprecationWarning, match=message) as seen:
        replaced = replace(RuntimeConfig(slots=1), **{name: value})
    assert [warning.filename for warning in seen] == [__file__]
    with pytest.warns(DeprecationWarning, match=message) as seen:
        assert getattr(made, name) == value
    assert [warning.filename for warning in seen] == [__file__]
    assert made == replaced == expected
    assert hash(made) == hash(expected)
    assert repr(made) == repr(expected)


def test_several_old_names_are_one_warning() -> None:
    with pytest.warns(MovedOptionWarning) as seen:
        made = RuntimeConfig(**MOVED_VALUES)
    configs = [moved_config(name, value) for name, value in MOVED_VALUES.items()]
    migration = next(config.migration for config in configs if config.migration != MigrationConfig())
    debug = {field: value for config in configs for field, value in vars(config.debug).items() if value != DEFAULTS[field]}
    assert made == RuntimeConfig(migration=migration, debug=DebugConfig(**debug))
    (warning,) = seen
    assert all(f"runtime.{name} is now {MOVED[f'runtime.{name}']}" in str(warning.message) for name in MOVED_VALUES)


def test_an_old_name_in_replace_keeps_the_other_debug_options() -> None:
    config = RuntimeConfig(debug=DebugConfig(split="local_even", overlap=False))
    with pytest.warns(MovedOptionWarning):
        assert replace(config, overlap=True) == RuntimeConfig(debug=DebugConfig(split="local_even"))  # type: ignore[call-arg]


@EACH_MOVED
def test_old_and_new_together_are_refused(name: str, value: Any) -> None:
    _, section, new = MOVED[f"runtime.{name}"].split(".")
    config: Any = {"debug": DebugConfig(), "migration": MigrationConfig()}[section]
    cure = rf"{type(config).__name__}\({new}=\.\.\.\) alone$"
    with pytest.raises(ValueError, match=rf"^runtime\.{name} and runtime\.{section} are both given; give {cure}") as no:
        RuntimeConfig(**{section: config, name: value})
    assert "\n" not in str(no.value)


def test_an_old_name_inside_debug() -> None:
    """As an argument, in `replace` and as an attribute; refused beside the new one."""
    message, debug = r"^runtime\.debug\.rehome_effort is now runtime\.debug\.migration_effort;", DebugConfig(migration_effort=0.5)
    with pytest.warns(MovedOptionWarning, match=message):
        assert DebugConfig(rehome_effort=0.5) == debug  # type: ignore[call-arg]
    with pytest.warns(MovedOptionWarning, match=message):
        assert replace(DebugConfig(), rehome_effort=0.5) == debug  # type: ignore[call-arg]
    with pytest.warns(MovedOptionWarning, match=message):
        assert debug.rehome_effort == 0.5  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match=r"rehome_effort and runtime\.debug\.migration_effort are both given; give migration_effort"
    ):
        DebugConfig(rehome_effort=0.5, migration_effort=0.5)  # type: ignore[call-arg]


def test_a_wrong_value_under_an_old_name_is_named_by_the_new_one() -> None:
    with pytest.warns(MovedOptionWarning), pytest.raises(ValueError, match=r"^runtime\.debug\.split is 'x'; choose 'exact' or"):
        RuntimeConfig(split="x")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "make", [lambda: RuntimeConfig("quota"), lambda: RuntimeConfig(polcy="quota"), lambda: DebugConfig("exact")]
)
def test_arguments_are_by_keyword_and_known(make: Any) -> None:
    with pytest.raises(TypeError, match=r"__init__\(\) (takes 1 positional argument|got an unexpected keyword argument 'polcy')"):
        make()


def test_sections_are_of_their_class() -> None:
    with pytest.raises(ValueError, match=r"^runtime\.debug is {'overlap': False}; give a DebugConfig$"):
        RuntimeConfig(debug={"overlap": False})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^runtime\.migration is 4; give a MigrationConfig$"):
        RuntimeConfig(migration=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^runtime\.migration\.every is -1; it must be 0 \(never\) or a number of steps$"):
        MigrationConfig(every=-1)
    with pytest.raises(
        ValueError, match=r"^runtime\.migration\.time_limit_s is nan; it must be 0 \(by the interval\) or more, and finite$"
    ):
        MigrationConfig(time_limit_s=float("nan"))


def test_values_stay_values() -> None:
    """Frozen, equal after replace, pickle and copies; none of these warns."""
    config = RuntimeConfig(slots=3, check_replicas_except=["a.*"], debug=DebugConfig(overlap=False, calibrate="never"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == copy.copy(config) == replace(config) == config
        assert replace(config, slots=2) != config
        assert replace(config, debug=replace(config.debug, overlap=True)).debug == DebugConfig(overlap=True, calibrate="never")
        assert len({config, replace(config), RuntimeConfig()}) == 2
    for value, name in ((config, "slots"), (config, "overlap"), (config.debug, "overlap")):
        with pytest.raises((FrozenInstanceError, AttributeError)):
            setattr(value, name, 1)


def test_options_that_are_gone_are_left_out_with_a_warning() -> None:
    with pytest.warns(MovedOptionWarning, match=r"^runtime\.reuse_copies: no effect any more, leave it out"):
        config = RuntimeConfig(slots=3, reuse_copies=True)  # type: ignore[call-arg]
    assert config == RuntimeConfig(slots=3)
    with pytest.warns(MovedOptionWarning, match=r"^runtime\.debug\.row_parts: no effect any more, leave it out"):
        assert DebugConfig(row_parts=1) == DebugConfig()  # type: ignore[call-arg]
