"""The report of a study: one page that opens offline, the same as Markdown, and the leaderboard as CSV."""

from dense_lab.report.write import ReportFiles, write_report

__all__ = ["ReportFiles", "write_report"]
