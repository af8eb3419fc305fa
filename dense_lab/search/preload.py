"""What the server that workers are forked from imports: what is slow. No plugin: it might start threads."""

import optuna.storages
import sqlalchemy.dialects.sqlite

import dense_lab.space
import dense_lab.training

__all__ = ["dense_lab", "optuna", "sqlalchemy"]
