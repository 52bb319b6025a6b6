"""Predicts the time of an optimizer step: what each rank computes, what it waits for, and why.

    step = TimeModel(workload, cluster, profile).step(plan)         # seconds by cause; the model caches what plans have in common

Sources: FLOPs and the communication of tensor and pipeline parallelism, arXiv 2104.04473 (sections 2 and 3, appendix); sequence parallelism
and selective recomputation, arXiv 2205.05198; ZeRO's traffic, arXiv 1910.02054 (section 7).

Shapes: B micro-batch, S sequence, M = B S tokens, H hidden size, F MLP width, A heads, V vocabulary, T tensor, P pipeline, D data size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from pangu.errors import InputError
from pangu.planner.hardware import Cluster
from pangu.planner.network import Network
from pangu.planner.plan import Plan, Recompute, Workload
from pangu.planner.profile import Profile
from pangu.planner.states import BYTES, FP32_BYTES

OPERATORS = 20
"""Number of kernels that the forward pass of a layer launches; the backward pass launches twice as many."""
ADAM_BYTES = 30
"""Bytes an update moves per parameter: fp32 weight and two moments in and out, the gradient in, the 16-bit weight out."""
ACCUMULATION_BYTES = 10
"""Bytes that adding a micro-batch's 16-bit gradient to an fp32 sum moves per parameter."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by cause; what a rank does is the mean over the pipeline stages."""

    compute: float
    recompute: float
    tensor: float
    """Seconds of communication for tensor parallelism."""
    point_to_point: float
    """Seconds of sending activations and gradients between stages."""
    imbalance: float
    """Seconds of waiting for the slowest stage."""
    bubble: float
    """Seconds of filling and draining the pipeline."""
    data: float
    """Seconds of communicating gradients and weights between replicas that are not hidden by computation."""
    optimizer: float
    """Seconds of the update, including transfers for offloading."""
    engine: float
    """Seconds of overhead of DeepSpeed and Python, if a profile has measured it."""

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(getattr(self, field.name) for field in fields(self))


class Piece(NamedTuple):
    """Seconds of one micro-batch in a part of the model: a layer, the embedding, the logits."""

    forward: float
    backward: float
    recompute: float
    tensor: float

    @property
    def total(self) -> float:
        """Forward and backward pass together."""
        return self.forward + self.backward + self.recompute + self.tensor


def waiting(times: Sequence[float], forward: float, micro_batches: int, interleave: int = 1) -> tuple[float, float]:
    """Seconds that a pipeline under 1F1B adds to the mean work of its stages; never too little, and exact for equal stages.

    The slowest stage computes all the time, but for three gaps. It waits for the stages before it to fill and to drain; for its first
    gradient to come back through the stages behind it, while it can only compute forward passes ahead; and at the end, when backward passes
    arrive no faster than the stages behind it send them. Equal stages give (stages - 1) / interleave times one stage.

    Args:
        times: of one micro-batch, forward and backward, in each stage.
        forward: share of them that is the forward pass.
        micro_batches: in a step.
        interleave: model parts a stage holds in turn.

    Returns:
        Waiting for the slowest stage, and the bubble.
    """
    whole, slowest = sum(times), max(times)
    at = times.index(slowest)
    behind = times[at + 1 :]
    round_trip = sum(behind)
    ahead = min(len(behind), micro_batches - 1)
    first = max(0.0, round_trip - ahead * forward * slowest)
    last = ahead * max(0.0, max(behind, default=0.0) - (1.0 - forward) * slowest)
    bubble = sum(times[:at]) + min(round_trip, first + last)
    return micro_batches * (slowest - whole / len(times)), bubble / interleave


class TimeModel:
    """Predicts the step time of plans for one workload on one cluster.

    Raises:
        InputError: the device has no peak for the workload's precision.
    """

    def __init__(self, workload: Workload, cluster: Cluster, profile: Profile) -> None:
        device, model = cluster.device, workload.model
        if workload.precision not in device.peak_tflops:
            raise InputError(
                f"{workload.precision}: the device {device.name} of cluster {cluster.name} has no peak_tflops for it. "
                f"Choose {', '.join(sorted(device.peak_tflops))}."
            )
        self.workload, self.cluster, self.profile = workload, cluster, profile
        self.network = Network(cluster, profile)
        self.element = BYTES[workload.precision]
        self._peak = device.peak_tflops[workload.precision].value * 1e12
        self._bandwidth = device.memory_bandwidth.value * 1e9 * profile.memory_efficiency
        self._host = device.host_bandwidth.value * 1e9
        balance = self._peak / (device.memory_bandwidth.value * 1e9) * self.element / 2
        self._saturation = profile.matmul_saturation * balance
        self._token_saturation = profile.token_saturation * balance
        self._formula = [2e-12 * x.m * x.n * x.k / self._formula_seconds(x.m, x.n, x.k) for x in profile.matmuls]
        self._layer_parameters = 4 * model.hidden_size**2 + 2 * model.hidden_size * model.ffn_hidden_size
        self._layers: dict[tuple[int, int, bool, Recompute], Piece] = {}
        self._ends: dict[tuple[int, int], tuple[Piece, Piece]] = {}

    def step(self, plan: Plan) -> StepTime:
        """Seconds of one optimizer step."""
        micro_batches = plan.micro_batches(self.workload)
        layer = self._layer(plan)
        first, last = self._embedding_and_logits(plan)
        stages = len(plan.stage_layers)
        hand_over = self._hand_over(plan)

        layers = sum(plan.stage_layers)
        times = [count * layer.total for count in plan.stage_layers]
        times[0] += first.total
        times[-1] += last.total
        # A stage hands over twice, forward and backward; the first and the last have one neighbour.
        handing = 2 * hand_over * plan.interleave
        for stage in range(stages):
            times[stage] += handing * ((stage > 0) + (stage < stages - 1)) / 2
        engine_step, engine_micro_batch = self._engine(plan)
        times = [seconds + engine_micro_batch for seconds in times]
        imbalance, bubble = waiting(times, layer.forward / (layer.total - layer.tensor), micro_batches, plan.interleave)
        share = micro_batches / stages
        # Ranks that share cores work faster while others wait; then a stage waits less for the others.
        busy, idle = share * sum(times), imbalance + bubble
        waits = max(0.0, (busy + idle) / self.profile.sharing - busy) / idle if idle else 0.0
        data, optimizer = self._update(plan, layer, micro_batches)
        return StepTime(
            compute=share * (layers * (layer.forward + layer.backward) + first.forward + first.backward + last.forward + last.backward),
            recompute=share * layers * layer.recompute,
            tensor=share * (layers * layer.tensor + first.tensor + last.tensor),
            point_to_point=share * handing * (stages - 1),
            imbalance=waits * imbalance,
            bubble=waits * bubble,
            data=data,
            optimizer=optimizer,
            engine=engine_step + micro_batches * engine_micro_batch,
        )

    def layer_seconds(self, plan: Plan) -> list[float]:
        """Seconds of a micro-batch in each transformer layer; the first with the embedding, the last with the logits."""
        seconds = [self._layer(plan).total] * self.workload.model.num_layers
        first, last = self._embedding_and_logits(plan)
        seconds[0] += first.total
        seconds[-1] += last.total
        return seconds

    def matmul(self, m: float, n: float, k: float) -> float:
        """Seconds of the product of an M x K with a K x N matrix: FLOPs / (peak e) (1 + m/M + c/N + c/K).

        c/N and c/K are the bytes of the operands and the result; m/M, with tokens as M, is also what each micro-batch pays once.
        """
        seconds = self._formula_seconds(m, n, k)
        if self.profile.matmuls:
            seconds *= self.profile.correction(m, n, k, self._formula)
        return seconds

    def _formula_seconds(self, m: float, n: float, k: float) -> float:
        slower = 1.0 + self._token_saturation / m + self._saturation * (1 / n + 1 / k)
        return 2.0 * m * n * k / (self._peak * self.profile.matmul_efficiency) * slower

    def _layer(self, plan: Plan) -> Piece:
        key = (plan.micro_batch_size, plan.layout.tensor, plan.sequence_parallel, plan.recompute)
        if key not in self._layers:
            self._layers[key] = self._layer_piece(*key)
        return self._layers[key]

    def _layer_piece(self, micro_batch: int, tensor: int, sequence_parallel: bool, recompute: Recompute) -> Piece:
        model, sequence, element = self.workload.model, self.workload.sequence_length, self.element
        hidden, ffn = model.hidden_size, model.ffn_hidden_size / tensor
        tokens = micro_batch * sequence
        start = self.profile.overhead_us * 1e-6

        linear = (
            self.matmul(tokens, 3 * hidden / tensor, hidden)
            + self.matmul(tokens, hidden, hidden / tensor)
            + self.matmul(tokens, ffn, hidden)
            + self.matmul(tokens, hidden, ffn)
        )
        attention, attention_backward = self._attention(micro_batch, tensor)
        mask = 1 if model.hidden_dropout else 0
        rows = tokens / (tensor if sequence_parallel else 1)
        # Two LayerNorms, in and out; two sums with the residual: two in, one out, and the dropout's mask. GELU, in and out.
        moved = rows * hidden * (2 * 2 * element + 2 * (3 * element + mask)) + tokens * ffn * 2 * element
        pointwise = moved / self._bandwidth + OPERATORS * start
        forward = linear + attention + pointwise
        accumulated = ACCUMULATION_BYTES * self._layer_parameters / tensor / self._bandwidth
        backward = 2 * linear + attention_backward + 2 * pointwise + accumulated
        again = {"none": 0.0, "selective": attention, "full": forward}[recompute]
        # Both directions reduce twice; full recomputation reduces once more each.
        reductions = 6 if recompute == "full" else 4
        talk = reductions * self.network.all_reduce(element * tokens * hidden, tensor, 1)
        if sequence_parallel:
            talk += self.profile.sequence_sums * self.network.all_reduce(element * hidden, tensor, 1)
        return Piece(forward, backward, again, talk)

    def _attention(self, micro_batch: int, tensor: int) -> tuple[float, float]:
        """Seconds of softmax(Q K^T) V of the heads of one rank, forward and backward."""
        model, sequence, element = self.workload.model, self.workload.sequence_length, self.element
        heads, width = micro_batch * model.num_heads / tensor, model.hidden_size / model.num_heads
        products = heads * (self.matmul(sequence, sequence, width) + self.matmul(sequence, width, sequence))
        if width % 8:
            products *= self.profile.unaligned
        if model.attention == "eager":
            # Softmax in and out, dropout in and out with its mask of one byte.
            dropout = 2 * element + 1 if model.attention_dropout else 0
            pointwise = heads * sequence * sequence * (2 * element + dropout) / self._bandwidth
            return products + pointwise, 2 * (products + pointwise)
        # Fused: half of the matrix is masked and skipped, nothing of it is stored, and the backward pass computes the scores again.
        return products / 2, products / 2 * 2.5

    def _embedding_and_logits(self, plan: Plan) -> tuple[Piece, Piece]:
        """What the first and the last stage do beyond their layers."""
        key = micro_batch, tensor = plan.micro_batch_size, plan.layout.tensor
        if key not in self._ends:
            model, element = self.workload.model, self.element
            tokens = micro_batch * self.workload.sequence_length
            reduce = self.network.all_reduce(element * tokens * model.hidden_size, tensor, 1)
            vocabulary = model.vocab_size / tensor
            lookup = tokens * model.hidden_size * 4 * element / self._bandwidth
            product = self.matmul(tokens, vocabulary, model.hidden_size)
            # Logits to fp32, exponentials, their gradient.
            loss = tokens * vocabulary * 3 * FP32_BYTES / self._bandwidth
            accumulated = ACCUMULATION_BYTES * vocabulary * model.hidden_size / self._bandwidth
            embedding = Piece(lookup, 2 * lookup + accumulated, 0.0, reduce)
            # The loss reduces a maximum, and then the label's score and the sum of exponentials, of each token.
            losses = self.network.all_reduce(tokens * FP32_BYTES, tensor, 1) + self.network.all_reduce(2 * tokens * FP32_BYTES, tensor, 1)
            logits = Piece(product + loss, 2 * product + loss + accumulated, 0.0, reduce + losses)
            self._ends[key] = embedding, logits
        return self._ends[key]

    def _hand_over(self, plan: Plan) -> float:
        """Seconds until the activations of a micro-batch are with the next stage: each tensor rank sends its part, then they gather."""
        layout = plan.layout
        if layout.pipeline == 1:
            return 0.0
        stride = layout.tensor * (layout.data if layout.order == "tp-dp-pp" else 1)
        bytes_ = self.element * plan.micro_batch_size * self.workload.sequence_length * self.workload.model.hidden_size
        sent = self.network.send(bytes_ / layout.tensor, layout.pipeline, stride)
        return sent if plan.sequence_parallel else sent + self.network.gather(bytes_, layout.tensor, 1)

    def _update(self, plan: Plan, layer: Piece, micro_batches: int) -> tuple[float, float]:
        """Seconds of what replicas exchange and nothing hides, and of the optimizer, on the stage with most parameters."""
        layout, element, model = plan.layout, self.element, self.workload.model
        stride = layout.tensor * (1 if layout.order == "tp-dp-pp" else layout.pipeline)
        table = model.vocab_size * model.hidden_size
        parameters = (max(plan.stage_layers) * self._layer_parameters + table) / layout.tensor
        bytes_ = element * parameters
        network = self.network
        passes = sum(plan.stage_layers) / layout.pipeline * layer.total * micro_batches
        if plan.zero_stage == 3:
            # Weights are gathered for the forward and the backward pass, gradients scattered after it; DeepSpeed does so tensor by tensor.
            data = self._not_hidden(3 * micro_batches * network.flat_gather(bytes_, layout.data, stride), passes)
        elif plan.zero_stage == 2:
            # After every micro-batch DeepSpeed sums whole buckets on all ranks, of which each keeps its part; after the update weights are
            # gathered. It overlaps neither unless told to.
            data = micro_batches * network.all_reduce(bytes_, layout.data, stride) + network.gather(bytes_, layout.data, stride)
        else:
            data = network.all_reduce(bytes_, layout.data, stride)
        if layout.pipeline > 1:  # first and last stage sum the gradients of the token embedding that they share
            ends = layout.tensor * (layout.data if layout.order == "tp-dp-pp" else 1) * (layout.pipeline - 1)
            data += network.all_reduce(element * table / layout.tensor, 2, ends)
        updated = parameters / (layout.data if plan.zero_stage else 1)
        if plan.offload_optimizer:
            # Gradients go to the host, weights come back, and the host updates at the speed of its own memory.
            optimizer = updated * (FP32_BYTES + element + ADAM_BYTES) / self._host
        else:
            optimizer = updated * ADAM_BYTES / self._bandwidth
        if plan.offload_parameters:
            data += 2 * micro_batches * bytes_ / layout.data / self._host
        return data, optimizer

    def _engine(self, plan: Plan) -> tuple[float, float]:
        """Seconds that the engine adds to a step, and to a micro-batch in each stage."""
        pipeline = plan.layout.pipeline > 1
        measured = self.profile.engine(plan.zero_stage, pipeline=pipeline)
        if measured is None:
            return 0.0, 0.0
        count = 1.0 if pipeline else float(sum(plan.stage_layers))
        if not pipeline and plan.zero_stage >= 2:
            count *= self.network.gather(0.0, plan.layout.data, plan.layout.tensor) / self.network.gather(0.0, measured.ranks, 1)
        return 1e-6 * measured.step_us * count, 1e-6 * measured.micro_batch_us * count

    def _not_hidden(self, traffic: float, computation: float) -> float:
        """What traffic adds to the computation that it runs beside: between all of it (exponent 1) and what exceeds it (endless)."""
        exponent = self.profile.overlap
        return (traffic**exponent + computation**exponent) ** (1 / exponent) - computation
