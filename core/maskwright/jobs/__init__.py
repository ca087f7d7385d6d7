"""The loops: pretrain, prune, sample and verify, on accelerate, with their report pages."""
