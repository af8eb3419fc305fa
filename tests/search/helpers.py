"""Studies to search over, and a search whose worker runs in the calling process."""

from pathlib import Path

from dense_lab.search.engine import Options, _Search
from dense_lab.search.worker import Worker
from dense_lab.space import Study

HEAD = "dense_lab: 1\nname: s\n"
CONTINUOUS = HEAD + "train: {tokens: 1000, lr: {float: [1e-4, 1e-1], log: true}}\n"
SIX = HEAD + "train: {tokens: 1000, lr: {choice: [1e-3, 1e-2, 1e-1]}}\nmodel: {core: {choice: [retnet, mamba]}}\n"


class Never:
    """A request to stop that never comes."""

    requested = False

    def interrupting(self):
        from contextlib import nullcontext

        return nullcontext()

    deferring = interrupting


def study(tmp_path: Path, text: str, search: str = "") -> Study:
    path = tmp_path / "s.yaml"
    path.write_text(text + (f"search: {{{search}}}\n" if search else ""))
    return Study.load(path)


class Here:
    """A search without processes and without MLflow."""

    def __init__(self, study: Study, folder: Path, train, **options):
        folder.mkdir(parents=True, exist_ok=True)
        self.search = _Search(study, folder, Options(device="cpu", mlflow_uri="none", train=train, **options))
        self.ledger, self.folder = self.search.ledger, folder

    def run(self):
        self.search.supervisor.settle()
        worker = Worker(self.search.job, Never())
        worker.run()
        return self.search._outcome(0, "")

    def one(self):
        """One trial."""
        Worker(self.search.job, Never())._one()
