"""Reproduction: runs are trained again from their stored specs, and the new numbers held against the recorded ones."""

from dense_lab.reproduce.rerun import Reproduction, reproduce

__all__ = ["Reproduction", "reproduce"]
