"""What the server that workers are forked from imports: slow, and the same for all. No plugin, which may start threads."""

import optuna.storages
import sqlalchemy.dialects.sqlite

import dense_lab.space
import dense_lab.training

__all__ = ["dense_lab", "optuna", "sqlalchemy"]
