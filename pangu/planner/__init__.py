"""What a layout costs, before anything is started."""
