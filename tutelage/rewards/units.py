"""Units of measure: what they measure, and how much of it. Only what answers are commonly given in."""

from __future__ import annotations

from fractions import Fraction

_RAW = {  # what is measured: (size in its base unit, spellings)
    "length": [("1", "m metre metres meter meters"), ("1000", "km kilometre kilometres kilometer kilometers"),
               ("1/100", "cm centimetre centimetres centimeter centimeters"),
               ("1/1000", "mm millimetre millimetres millimeter millimeters"), ("1609344/1000", "mi mile miles"),
               ("3048/10000", "ft foot feet"), ("254/10000", "in inch inches"), ("9144/10000", "yd yard yards")],
    "mass": [("1", "g gram grams gramme grammes"), ("1000", "kg kilogram kilograms"), ("1/1000", "mg milligram milligrams"),
             ("1000000", "t tonne tonnes"), ("45359237/100000", "lb lbs pound pounds"), ("45359237/1600000", "oz ounce ounces")],
    "time": [("1", "s sec secs second seconds"), ("60", "min mins minute minutes"), ("3600", "h hr hrs hour hours"),
             ("86400", "day days"), ("604800", "week weeks"), ("1/1000", "ms millisecond milliseconds")],
    "months": [("1", "month months"), ("12", "year years yr yrs")],
    "volume": [("1", "l L litre litres liter liters"), ("1/1000", "ml mL millilitre millilitres milliliter milliliters")],
    "dollars": [("1", "$ US$ USD dollar dollars"), ("1/100", "¢ cent cents")],
    "euros": [("1", "€ EUR euro euros")],
    "pounds sterling": [("1", "£ GBP")],
    "celsius": [("1", "°C celsius Celsius")], "fahrenheit": [("1", "°F fahrenheit Fahrenheit")],
    "kelvin": [("1", "K kelvin kelvins")],
    "angle": [("1", "° degree degrees")], "radians": [("1", "rad radian radians")],
    "power": [("1", "W watt watts"), ("1000", "kW kilowatt kilowatts"), ("1000000", "MW megawatt megawatts"),
              ("1/1000", "mW milliwatt milliwatts")],
    "energy": [("1", "J joule joules"), ("1000", "kJ kilojoule kilojoules")],
    "force": [("1", "N newton newtons")], "voltage": [("1", "V volt volts")], "current": [("1", "A ampere amperes")],
    "frequency": [("1", "Hz hertz"), ("1000", "kHz"), ("1000000", "MHz"), ("1000000000", "GHz")],
    "bytes": [("1", "B byte bytes"), ("1000", "kB kilobyte kilobytes"), ("1000000", "MB megabyte megabytes"),
              ("1000000000", "GB gigabyte gigabytes")],
    "bits": [("1", "bit bits"), ("1000", "kb kbit"), ("1000000", "Mb Mbit"), ("1000000000", "Gb Gbit")],
}  # fmt: skip
UNITS: dict[str, tuple[str, Fraction]] = {
    name: (measured, Fraction(size)) for measured, sizes in _RAW.items() for size, names in sizes for name in names.split()
}
"""Spelling -> what it measures, and how much in that measure's base unit. Case counts: mW is not MW."""

MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
