"""The base and adapters side by side on one data file: scores with intervals, and what was forgotten.

```python
from deltatune.scoring import evaluate_adapters

found = evaluate_adapters(["my-lora", "my-prefix"], "test.jsonl", forgetting="builtin")
found.models[1].scores["loss"]  # Interval(value, low, high)
```
"""

from deltatune.scoring.bootstrap import Interval as Interval
from deltatune.scoring.evaluate import Comparison as Comparison
from deltatune.scoring.evaluate import evaluate_adapters as evaluate_adapters
from deltatune.scoring.result import Evaluated as Evaluated
from deltatune.scoring.result import Sample as Sample
