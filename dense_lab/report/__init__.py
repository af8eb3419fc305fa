"""The report of a study, or of several: what was found, with intervals and verdicts, in every form a paper needs."""

from dense_lab.report.write import ReportFiles, write_report

__all__ = ["ReportFiles", "write_report"]
