"""The neuron-norm claims, checked on synthetic training of two-layer mixtures of experts: `python -m theory --help`."""
