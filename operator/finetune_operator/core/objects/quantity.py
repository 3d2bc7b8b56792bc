"""Kubernetes quantities as numbers, to compare them."""

from decimal import Decimal

_UNITS = {
    "m": Decimal("0.001"),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTP", start=1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTP", start=1)},
}


def value(quantity: int | str) -> Decimal:
    """Return the number that a quantity such as 16Gi stands for; it has the form of finetune_api.fields.Quantity."""
    text = str(quantity)
    number = text.rstrip("mkKMGTPi")
    return Decimal(number) * _UNITS.get(text[len(number) :], Decimal(1))
