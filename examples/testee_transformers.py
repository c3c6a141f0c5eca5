"""A testee of your own: Hugging Face's DeepSeek-V3 under the conformance suite.

    dsv3 conformance run --testee reference --testee hf="python examples/testee_transformers.py" --checkpoint DIR

Transformers rounds in other places and sums in other orders: it claims closeness, and the report says how far its
logits are from the reference's and where bits differ first. Without `claim` a testee is judged by every bit.
"""

import torch
from transformers import DeepseekV3ForCausalLM, __version__

from dsv3_plugin.conformance.protocol import Case, Claim, Job, Served, prefix_digests
from dsv3_plugin.conformance.rows import LayerRecorder, RowKey
from dsv3_plugin.conformance.sampling import Answer, next_token, prompt_answer
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.engines import class_name


class TransformersTestee:
    """One sequence at a time, over transformers' own cache of keys and values."""

    name = "transformers"
    claim: Claim = "closeness"
    schedule_not_followed = "one request at a time: no batches, prefix cache or drafts"

    def __init__(self, job: Job) -> None:
        self.model = DeepseekV3ForCausalLM.from_pretrained(job.checkpoint, dtype="auto").to(job.device).eval()
        self.layers = LayerRecorder(self.model.model, self.model.config.num_hidden_layers)

    def versions(self) -> dict[str, str]:  # noqa: D102
        return {"transformers": __version__}

    def served(self) -> Served:  # noqa: D102
        return Served(model_class=class_name(self.model), draft_class=None, profile=str(self.model.dtype), kernels={})

    def run(self, case: Case) -> program.Outcome:
        """Generate each request; every pass records its rows, of logits and of the model's modules."""
        outcome = program.Outcome()
        self.layers.recorder = outcome.recorder
        for index, request in enumerate(case.requests):
            tokens, cache = list(request.prompt_token_ids), None
            of_prompt, generated = list[Answer](), list[Answer]()
            while len(generated) < request.max_tokens:
                first = len(tokens) - 1 if generated else 0
                keys = self.layers.keys = [
                    RowKey(index, p, d) for p, d in enumerate(prefix_digests(tokens, first), first)
                ]
                fed = torch.tensor([tokens[first:]], device=self.model.device)
                output = self.model(fed, past_key_values=cache, use_cache=True)
                logits, cache = output.logits[0].float(), output.past_key_values
                outcome.recorder.add("logits", keys, logits)
                if request.prompt_logprobs and not generated:
                    of_prompt = [prompt_answer(row, request, p) for p, row in enumerate(logits[:-1], 1)]
                generated.append(next_token(logits[-1], request, tokens))
                tokens.append(generated[-1].token)
            outcome.requests.append(program.request_result(tokens, generated, of_prompt))
        return outcome


program.main(TransformersTestee)
