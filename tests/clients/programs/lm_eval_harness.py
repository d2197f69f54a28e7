"""lm-eval: a task of two generated answers over chat completions, and log-likelihoods over completions."""

import json
import tempfile
from pathlib import Path

import lm_eval
from common import MODEL, QUESTION, URL, report
from lm_eval.tasks import TaskManager

folder = Path(tempfile.mkdtemp())
(folder / "rows.json").write_text("\n".join(json.dumps({"q": f"{QUESTION} {n}", "a": f" {n}"}) for n in (1, 2)))
common = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}},
    "test_split": "test",
    "doc_to_text": "{{q}}",
}
generate = {
    **common,
    "task": "answers",
    "output_type": "generate_until",
    "doc_to_target": "It is 21 degrees in Geneva.",
    "generation_kwargs": {"until": ["###"], "max_gen_toks": 64},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
result = lm_eval.simple_evaluate(
    model="local-chat-completions",
    model_args={"model": MODEL, "base_url": f"{URL}/v1/chat/completions", "tokenizer_backend": None},
    tasks=[generate],
    apply_chat_template=True,
    task_manager=TaskManager(),
    bootstrap_iters=0,
)
report(
    exact_match=result["results"]["answers"]["exact_match,none"], samples=result["n-samples"]["answers"]["effective"]
)
