"""DSPy: a prediction in its own form of fields."""

import dspy
from common import MODEL, QUESTION, URL, report

model = dspy.LM(f"openai/{MODEL}", api_base=f"{URL}/v1", api_key="none", cache=False)
with dspy.context(lm=model):
    report(answer=dspy.Predict("question -> answer")(question=QUESTION).answer)
