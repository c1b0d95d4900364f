"""ACPI: what a PC tells its kernel of itself.  `tables` makes the tables, in the language of `aml`."""
