"""The methods of the field: a file composes a `Policy` from parts."""
