"""Predicts memory and time of parallel layouts by arithmetic; nothing is started."""
