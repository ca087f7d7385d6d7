"""Next-token prediction."""

COMPONENTS = ()
