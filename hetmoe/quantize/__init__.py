"""Low-bit digital weights: allocation of bits, quantisers, packing, error bounds."""
