"""virtio over PCI (virtio 1.3, 4.1), from the bus down to a device's registers.

`bus.HostBridge` takes the processor's accesses to configuration space and to memory;
each `function.PciFunction` on it has a `config.ConfigSpace`, an `msix.MsixTable` and a
`transport.PciTransport`, and says what an access asks of its owner (`effects`).
"""
