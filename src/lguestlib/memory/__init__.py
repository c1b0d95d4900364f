"""Guest-physical memory: regions, bounds-checked zero-copy views, ordering, images."""
