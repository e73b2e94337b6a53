"""How the filters say that a measured ratio is beyond its threshold."""


def below(measured: float, least: float | None, what: str) -> str | None:
    """What to say if `measured` is less than `least`; None: it is not, or there is no bound."""
    return f"{measured:.3f} {what}, less than {least:g}" if least is not None and measured < least else None


def above(measured: float, most: float | None, what: str) -> str | None:
    """What to say if `measured` is more than `most`; None: it is not, or there is no bound."""
    return f"{measured:.3f} {what}, more than {most:g}" if most is not None and measured > most else None
