"""Pure functions from a placement and a topology to a schedule, one kind a file."""
