"""The network, its layers, and weights from elsewhere."""
