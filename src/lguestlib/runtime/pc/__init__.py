"""A PC on KVM, as a distribution's Linux expects one: PCI, ACPI, several processors, a serial port and a clock."""
