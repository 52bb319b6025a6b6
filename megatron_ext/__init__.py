"""How tensors are split over devices: the parallel layers and the collectives under them. They know no model."""
