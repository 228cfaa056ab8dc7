"""Certified error bounds of quantized experts: what they change at most in outputs, router logits and routing.

Everything is evaluated in float64, and rounding is part of the bounds (`rounding`), so that two evaluations in float64,
of the model and of its quantized version, never differ by more.
"""
