"""Notices that a rank hangs, is slow or computes wrong numbers, and names it."""
