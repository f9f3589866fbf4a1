"""Report error-checking: does a drafted radiology report have a mistake, and of which kind."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="report-error-checking",
    title="Report error-checking",
    paper="2312.13103",
    summary="Say whether a drafted radiology report has a mistake; training data with known mistakes.",
    claims=(
        Claim("Instruction tuning on damaged reports teaches a model to find mistakes.", "abstract"),
        Claim("An ensemble is right about most of the reports that a clinician got wrong.", "abstract"),
    ),
    parts={
        "pipelines": {"report_errors": ".pipeline:ReportErrors"},
        "benchmarks": {"report-errors": ".benchmark:ReportErrors"},
    },
    responder=".responder:DraftChecker",
)
