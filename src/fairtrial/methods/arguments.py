"""One wording for refused arguments: what it is called, what it was, what is accepted."""


def require(accepted: bool, name: str, value: object, expected: str) -> None:
    """Raise `ValueError` unless `accepted`; write the condition so that NaN fails it (`a > 0`, not `not a <= 0`)."""
    if not accepted:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
