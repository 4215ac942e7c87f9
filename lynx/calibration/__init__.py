"""Make stand-ins: what experts do to a user's text, and the low-rank maps that come closest to it."""
