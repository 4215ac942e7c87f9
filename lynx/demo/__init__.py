"""The demo: what selection costs and buys, measured on the reference model and on layers of a real shape."""
