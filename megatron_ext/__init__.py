"""How tensors are split over devices: the parallel layers and the collectives under them. Knows no PanGu."""
