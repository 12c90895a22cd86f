"""What a run would be trained on, looked at before it: `check("rows.jsonl", model="folder", task="chat")`."""

from deltatune.data.checking.check import check as check
from deltatune.data.checking.report import Leak as Leak
from deltatune.data.checking.report import PartReport as PartReport
from deltatune.data.checking.report import Report as Report
