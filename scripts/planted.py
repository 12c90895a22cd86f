"""The faults that `mutants.py` plants: one line of a method, and the same line with a typical mistake in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In `file` of the package, `right` becomes `wrong`."""

    method: str
    fault: str
    right: str
    wrong: str
    place: str = ""  # if not the method's file

    @property
    def file(self) -> str:
        return self.place or f"methods/{self.method}.py"

    def into(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
            LookupError: The line has changed or stands there more than once; the mutant needs another.
        """
        if text.count(self.right) != 1:
            raise LookupError(f"{self.file} holds {self.right!r} {text.count(self.right)} times, not once")
        return text.replace(self.right, self.wrong)


MUTANTS = [
    Mutant("lora", "forgotten scale, both ways", "return self.A, self.scaling * self.B", "return self.A, 1.0 * self.B"),
    Mutant("lora", "bias not scaled, forward", "shift(update, self.scaling * self.lora_B", "shift(update, self.lora_B"),
    Mutant("lora", "wrong sign, both ways", "self.lora_B.matrix, self.blocks", "-self.lora_B.matrix, self.blocks"),
    Mutant("lora", "bias forgotten in the weight", "bias + self.bias_scaling * own", "bias"),
    Mutant(
        "lora",
        "dropout on indices",
        "x if self.embedding or not self.training else self.lora_dropout(x)",
        "self.lora_dropout(x)",
    ),
    Mutant("lora", "rank-stabilised scale", "math.sqrt(r)", "r"),
    *[
        Mutant("lora_starts", fault, right, wrong, place)
        for fault, right, wrong, place in [
            ("scaling not divided out", "(S / scaling).sqrt()", "S.sqrt()", "lora/starts/start.py"),
            ("last columns of Q", "Q[:, : site.r]", "Q[:, -site.r :]", "lora/starts/olora.py"),
            ("largest directions", "U[:, -site.r :]", "U[:, : site.r]", "lora/starts/mica.py"),
            ("the same half twice", "Q[1::2] / 10", "Q[0::2] / 10", "lora/starts/orthogonal.py"),
            ("quantises W each time", "site.W - site.scaling * B @ A", "site.W", "lora/starts/loftq.py"),
            ("levels between, not halfway", "(levels[1:] + levels[:-1]) / 2", "levels[1:]", "lora/quantised.py"),
            ("rank-stabilised alpha doubled", "factor = sqrt(2)", "factor = 2", "lora/stacked.py"),
            ("start added in the file", "beside(B, -B0, 1)", "beside(B, B0, 1)", "lora/stacked.py"),
            ("start added on reading", "-B[:, r:].flatten(1)", "B[:, r:].flatten(1)", "lora/stacked.py"),
            ("start dropped out too", "h - layer.apply(x, self.start_A)", "h - layer.apply(dropped, self.start_A)", ""),
            ("start forgotten in the weight", "B0 @ (A - self.start_A)", "0 * B0 @ (A - self.start_A)", ""),
        ]
        for place in [place or "methods/lora.py"]
    ],
    *[
        Mutant("lora_data_starts", fault, right, wrong, f"lora/{place}")
        for fault, right, wrong, place in [
            ("ipm and kpm exchanged", "slice(0, r) if largest", "slice(0, r) if not largest", "covariance.py"),
            ("gradients lost", "parameter.grad = gradient", "parameter.grad = None", "gradients.py"),
            ("sum of gradients", "w.grad / passes[path]", "w.grad / 1", "gradients.py"),
            ("gamma not rooted", "stable_gamma**0.5", "stable_gamma", "starts/lora_ga.py"),
            ("least explained first", "argsort(descending=True)", "argsort(descending=False)", "watched.py"),
            ("mean of the last batch", "apart = self.mean - mean", "apart = 0 * mean", "components.py"),
            ("alpha as it was", "alpha *= rank / r", "alpha *= 1", "eva.py"),
        ]
    ],
    Mutant("lora_replace", "scaling not divided out", "adapter.scaling)", "1.0)", "lora/replace.py"),
    *[
        Mutant(variant, fault, right, wrong, place=f"lora/variants/{variant}.py")
        for variant, fault, right, wrong in [
            ("dora", "lengths not detached, weight", "weight.detach(), dim=1", "weight, dim=1"),
            ("dora", "lengths not detached, forward", "@torch.no_grad()\n", ""),
            ("dora", "cross term once", "2 * (W @ A.T)", "(W @ A.T)"),
            ("dora", "lengths of the base alone", "*lora.whole(at.A, at.B)) - 1", "0 * at.A, 0 * at.B) - 1"),
            ("dora", "frozen summands forgotten", "*lora.whole(at.A, at.B)) - 1", "at.A, at.B) - 1"),
            ("dora", "bias stretched", "bias = lora.adapted_bias(at.layer)", "bias = None"),
            ("dora", "dropout on the update alone", "z = at.layer(at.dropped) +", "z = at.layer(at.x) +"),
            ("dora", "m starts at the base's lengths", "*lora.whole(*lora.factors()))", "0 * lora.A, 0 * lora.B)"),
            ("dora", "gradient of m", "(grads[0] * z)", "(grads[0] * z * (1 + c))"),
            (
                "qalora",
                "mean instead of scaled mean",
                "A * (self.groups / self.qalora_group_size)",
                "A / self.qalora_group_size",
            ),
            (
                "qalora",
                "groups interleaved",
                "repeat_interleave(self.qalora_group_size, dim=1)",
                "repeat(1, self.qalora_group_size)",
            ),
            (
                "bdlora",
                "blocks in the other factor",
                "return cls(options.nblocks, in_a)",
                "return cls(options.nblocks, not in_a)",
            ),
            ("bdlora", "a layer that nothing names", "if options.match_strict:", "if False:"),
            ("kasa", "gate forgotten", "return self.lora_diag[:, None] * A", "return A"),
            ("kasa", "largest values left out", "Vh[-r:].clone()", "Vh[:r].clone()"),
            ("kasa", "left-out part added", "-U[:, -r:] * S[-r:]", "U[:, -r:] * S[-r:]"),
            ("kasa", "squared loss of A and B", ".norm()", ".square().sum()"),
            ("monteclora", "samples in evaluation", "if self.training else A", "if True else A"),
            ("monteclora", "spread not squared", "self.std_prior.exp().square()", "self.std_prior.exp()"),
            ("monteclora", "weights' sum for their norm", "w.norm()", "w.sum()"),
            (
                "monteclora",
                "sign of the divergence",
                "(torch.lgamma(b) - torch.lgamma(a)).sum()",
                "(torch.lgamma(a) - torch.lgamma(b)).sum()",
            ),
            ("monteclora", "sum over layers", "return loss / self.layers", "return loss"),
            ("velora", "scale forgotten", "ctx.scale * grads[0]", "grads[0]"),
            ("velora", "vector of any length", "torch.where(length > 0, v / length,", "torch.where(length > 0, v,"),
            ("velora", "in evaluation too", "self.training and torch.is_grad_enabled()", "torch.is_grad_enabled()"),
            (
                "alora",
                "first occurrence",
                "torch.where(here, column, -1).amax(dim=1)",
                "torch.where(here, column, -1).clamp_min(0).amin(dim=1)",
            ),
            (
                "alora",
                "from the end of the invocation on",
                "return torch.where(last < 0, NOWHERE, last)",
                "return torch.where(last < 0, NOWHERE, last + len(wanted))",
            ),
            ("alora", "one token late, given", "column >= length - given", "column > length - given"),
            ("alora", "cache not counted", "return past + column >=", "return column >="),
            ("alora", "silent behind a cache", "known = isinstance(past, int) and past == 0", "known = True"),
            ("arrow", "signed scores", ".abs()  # (..., experts)", "  # (..., experts)"),
            (
                "arrow",
                "softmax over all",
                "(best.values / self.temperature).softmax(dim=-1)",
                "(scores / self.temperature).softmax(dim=-1).gather(-1, best.indices)",
            ),
            ("arrow", "temperature forgotten", "best.values / self.temperature", "best.values"),
            (
                "arrow",
                "scales forgotten",
                "weights * weights.new_tensor([expert.scaling for expert in experts])",
                "weights",
            ),
            ("arrow", "last singular vector", "eigenvectors[:, -1]", "eigenvectors[:, 0]"),
            ("arrow", "general knowledge in one factor", "[b - mean_B for b in B]", "[b for b in B]"),
            ("arrow", "kept while experts train", "self.kept.drop()\n", "pass\n"),
        ]
    ],
    Mutant("ia3", "output's vector on the input", "self.l[:, None] * weight", "weight * self.l[:, None].mean()"),
    Mutant("ia3", "bias not scaled", "else bias * self.l", "else bias"),
    Mutant("ia3", "vector not repeated over a kernel", "repeat_interleave(self.kernel)", "repeat(self.kernel)"),
    Mutant(
        "hra",
        "reflections in the wrong order",
        "reversed(self.U.to(x.dtype).unbind(1))",
        "self.U.to(x.dtype).unbind(1)",
    ),
    Mutant("hra", "vectors not normalised", "self.hra_u / self.hra_u.norm(dim=0)", "self.hra_u"),
    Mutant("hra", "half a reflection", "x - 2 * (x @ u)", "x - (x @ u)", place="factors.py"),
    Mutant("oft", "transposed rotation, weight", '"onc,nkc->onk"', '"onk,nkc->onc"'),
    Mutant(
        "oft", "transposed rotation, both ways", "return self._dropped(R).expand", "return self._dropped(R.mT).expand"
    ),
    Mutant("oft", "projection not passed by the gradient", "Q + (drawn - Q).detach()", "drawn"),
    Mutant(
        "hira",
        "added instead of multiplied",
        "return weight * (self.B @ self.A)",
        "return 0 * weight + self.B @ self.A",
    ),
    Mutant("hira", "weight itself not kept", "return weight + self.update(weight)", "return self.update(weight)"),
    Mutant("hira", "dropout on the whole input", "y = layer(x)  # W", "x = self.hira_dropout(x); y = layer(x)  # W"),
    Mutant("hira", "ranks by name forgotten", "r = pattern_value(config.rank_pattern, path, config.r)", "r = config.r"),
    Mutant("loha", "forgotten scale", "configured_scaling = alpha / r", "configured_scaling = 1.0"),
    Mutant("loha", "sum instead of product", "(A1 @ B1) * (A2 @ B2)", "(A1 @ B1) + (A2 @ B2)"),
    Mutant("loha", "factors exchanged, forward", "A1[:, :, None] * A2[:, None]", "A2[:, :, None] * A1[:, None]"),
    Mutant("loha", "dropout not scaled up", "rescale=True", "rescale=False"),
    Mutant("loha", "core forgotten", "tucker(self.hada_t2, A2, B2)", "tucker(self.hada_t1, A2, B2)"),
    Mutant("lokr", "forgotten scale", "configured_scaling = alpha / r", "configured_scaling = 1.0"),
    Mutant(
        "lokr",
        "factors exchanged",
        "torch.kron(w1, w2 if w2.ndim == 3 else w2.flatten(1))",
        "torch.kron(w2.flatten(1), w1)",
    ),
    Mutant("lokr", "x not as rows of n, forward", "return h.mT.flatten(-2)", "return h.flatten(-2)"),
    Mutant("lokr", "full matrix one rank late", "if r >= max(q, n) / 2", "if r > max(q, n) / 2"),
    Mutant("lokr", "order of a Conv1d", "w2 if w2.ndim == 3 else w2.flatten(1)", "w2.flatten(1)"),
    Mutant(
        "lokr", "scale of the rows forgotten", "return scale_of_rows(x, layer, first.dtype) * (first", "return (first"
    ),
    Mutant(
        "gralora", "scale without the hybrid rank", "self.scaling = alpha / (r + hybrid_r)", "self.scaling = alpha / r"
    ),
    Mutant("gralora", "shares not exchanged", ".transpose(0, 1).flatten(0, 2)", ".flatten(0, 2)"),
    Mutant(
        "gralora",
        "whole update forgotten in the weight",
        "torch.cat([up, self.gralora_B_general.weight], 1)",
        "torch.cat([up, 0 * self.gralora_B_general.weight], 1)",
    ),
    Mutant("gralora", "blocks drawn as one", "in (*A, *B, *(", "in (A, B, *("),
    Mutant(
        "miss", "mean instead of sum, forward", ".unflatten(-1, (-1, r)).sum(-2)", ".unflatten(-1, (-1, r)).mean(-2)"
    ),
    Mutant("miss", "blocks of inputs side by side", "columns.repeat(1, ", "columns.repeat_interleave(dim=1, repeats="),
    Mutant(
        "miss",
        "outputs repeated one by one",
        "y.repeat(*[1] * (x.ndim - 1), self.copies)",
        "y.repeat_interleave(self.copies, -1)",
    ),
    Mutant("miss", "bat without D alone", "blocks, D) + D[:, :, None]", "blocks, D)"),
    Mutant("miss", "bat with D transposed", '"joik,jkl->joil"', '"joik,jlk->joil"'),
    Mutant("delora", "rank forgotten", "self.delora_lambda / self.r / (a * b)", "self.delora_lambda / (a * b)"),
    Mutant(
        "delora",
        "norms of rows and columns exchanged",
        "self.delora_A.norm(dim=-1)",
        "self.delora_A.norm(dim=0).mean()",
    ),
    Mutant("delora", "norms of the weight forgotten", "self.delora_A * self.delora_w_norm", "self.delora_A * 1"),
    Mutant(
        "delora",
        "short vectors blown up",
        "self.delora_B.norm(dim=-2).clamp_min(SHORTEST)",
        "self.delora_B.norm(dim=-2).clamp_min(1e-12)",
    ),
    Mutant(
        "delora",
        "vectors not normalised by the gradient",
        "clamp_min(SHORTEST), self.delora_B.norm",
        "clamp_min(SHORTEST).detach(), self.delora_B.norm",
    ),
    Mutant("oft", "series one term short", "max(terms - 1, 3)", "max(terms - 2, 3)", place="factors.py"),
    Mutant(
        "hira", "one added twice", "return weight + self.update(weight)", "return weight + weight + self.update(weight)"
    ),
    Mutant("hira", "embedding not scaled by its rows", "y + y * F.linear", "y + F.linear"),
    Mutant(
        "loha",
        "forgotten scale, forward",
        "return self.scaling * layer.mix(layer.apply(x, rows)",
        "return layer.mix(layer.apply(x, rows)",
    ),
    Mutant("loha", "factors crossed", "(A1[:, :, None] * A2[:, None])", "(A2[:, :, None] * A1[:, None])"),
    Mutant(
        "lokr",
        "Kronecker factors swapped",
        "(self.w1[0].shape[1], self.w2[0].shape[1])",
        "(self.w2[0].shape[1], self.w1[0].shape[1])",
    ),
    Mutant(
        "lokr",
        "wrong column of an embedding",
        "((self.w1, x // n), (self.w2, x % n))",
        "((self.w1, x % n), (self.w2, x // n))",
    ),
    Mutant("gralora", "blocks not exchanged", ".transpose(0, 2).flatten(2)", ".flatten(2)"),
    Mutant(
        "gralora", "forgotten scale, weight", "return weight + self.scaling * (up @ down)", "return weight + up @ down"
    ),
    Mutant(
        "miss",
        "neighbouring inputs summed instead of blocks",
        ".unflatten(-1, (-1, r)).sum(-2)",
        ".unflatten(-1, (r, -1)).sum(-1)",
    ),
    Mutant(
        "delora",
        "factor not scaled in the weight",
        "(self.delora_B * self.scaling) @ self.down",
        "self.delora_B @ self.down",
    ),
    Mutant(
        "c3a",
        "forgotten division by the width",
        "circulant(self.c3a_kernel) / self.width",
        "circulant(self.c3a_kernel)",
    ),
    Mutant(
        "c3a",
        "correlation turned into convolution",
        "torch.stack([real, -imaginary]), torch.stack([imaginary, real])",
        "torch.stack([real, imaginary]), torch.stack([-imaginary, real])",
        place="factors.py",
    ),
    Mutant("fourierft", "half columns not mirrored", "torch.where(left, rows, -rows % height)", "rows"),
    Mutant(
        "fourierft",
        "unseeded places",
        "torch.Generator().manual_seed(seed)",
        "torch.Generator().manual_seed(seed + 1)",
        place="factors.py",
    ),
    Mutant(
        "waveft", "bands of the wavelet swapped", "row % m + column // n * m, column % n + row // m * n", "row, column"
    ),
    Mutant("peanut", "forgotten scale, weight", "return wide + self.scaling * (B @", "return wide + (B @"),
    Mutant("road", "bias forgotten", "return bias + own * bias + partners * self.partners(bias, 0)", "return bias"),
    Mutant(
        "road",
        "partners without sign or angle",
        "+ layer.scale(self.partners(y, self.axis), partners)",
        "- layer.scale(self.partners(y, self.axis), partners)",
    ),
    Mutant(
        "boft", "rotation not transposed in the weight", "self.rotate(weight, transpose=True)", "self.rotate(weight)"
    ),
    Mutant("boft", "bias scaled with the output", "y if bias is None else y - bias.to(y.dtype)", "y"),
    Mutant("boft", "generator not made skew", "cayley((self.boft_R - self.boft_R.mT) / 2)", "cayley(self.boft_R)"),
    Mutant(
        "psoft", "identity not taken off", "return R - torch.eye(self.r, device=R.device, dtype=R.dtype)", "return R"
    ),
    Mutant("deft", "bias taken out with the subspace", "if layer.bias is not None:", "if False:"),
    Mutant("deft", "sign of the projection", "change = -(N.T @ weight)", "change = N.T @ weight"),
    Mutant("beft", "bias forgotten in the weight's layer", "return d if bias is None else bias + d", "return d"),
    Mutant(
        "glora",
        "C without the weight",
        "(weight @ self.glora_C.value.to(weight.dtype)).squeeze(-1)",
        "self.glora_C.value.sum()",
    ),
    Mutant("glora", "D forgotten", "adapted = adapted + bias * self.glora_D.value", "adapted = adapted"),
    Mutant(
        "vera",
        "lambda_d forgotten in the weight",
        "(b * self.vera_B) @ (d * self.vera_A)",
        "(b * self.vera_B) @ self.vera_A",
    ),
    Mutant("pvera", "standard deviation without the half", "torch.exp(log_variance / 2)", "torch.exp(log_variance)"),
    Mutant("randlora", "gamma forgotten", "* self.randlora_A * self.randlora_gamma)", "* self.randlora_A)"),
    Mutant("vblora", "B not transposed", ".transpose(1, 2).flatten(0, 1)", ".flatten(1).T"),
    Mutant(
        "adalora",
        "mask of E forgotten in the weight",
        "(self.lora_B @ (self.lora_E * self.lora_A))",
        "(self.lora_B @ self.lora_A)",
    ),
    Mutant("adalora", "penalty of one factor only", "(norms[0] + norms[1])", "(norms[0] + norms[0])"),
    Mutant(
        "bitfit",
        "bias replaced instead of moved",
        "return bias + self.bitfit_bias.view_as(bias)",
        "return self.bitfit_bias.view_as(bias)",
    ),
    Mutant("ln_tuning", "bias of the base", "return self.ln_tuning_layers.bias", "return bias"),
    Mutant(
        "trainable_tokens",
        "rows added instead of put",
        "index_copy(1 if self.reads_tokens else 0",
        "index_add(1 if self.reads_tokens else 0",
    ),
    Mutant("beft", "wrong sign of the bias", "bias + d", "bias - d"),
    Mutant(
        "beft", "missing in the forward pass", "shift(layer(x), self.beft_bias.flatten(self.rows), layer)", "layer(x)"
    ),
    Mutant("glora", "A added, not multiplied", "adapted + weight * self.glora_A.value", "adapted + self.glora_A.value"),
    Mutant("glora", "bias of the base scaled too", "bias + bias * a", "bias"),
    Mutant("supertuning", "the smallest entries", "largest=largest", "largest=not largest"),
    Mutant("supertuning", "forgotten scale", "(self.scaling * update)", "update"),
    Mutant(
        "supertuning",
        "gradient of the wrong entries, through the sum",
        "of_sum.flatten().index_select",
        "of_sum.T.flatten().index_select",
        place="one_product.py",
    ),
    Mutant(
        "supertuning",
        "rows and columns swapped",
        "places // self.shape[1], places % self.shape[1]",
        "places % self.shape[0], places // self.shape[0]",
    ),
    Mutant("adamss", "rows in the order of the layer", "torch.cat(members).to", "torch.cat(members).sort()[0].to"),
    Mutant("adamss", "update of the bias forgotten", "bias if bias is None else bias + up @ constant", "bias"),
    Mutant("osf", "gradient onto the high space", "self.U_high is None)\n", "self.U_high is not None)\n"),
    Mutant("osf", "start not subtracted", "(now - start)", "now"),
    Mutant("osf", "the large directions train", '"V_start": V[k:]', '"V_start": V[: len(S) - k]'),
    Mutant("bottleneck", "forgotten scale", "(self.scaling * wide)", "wide", place="outputs/bottleneck.py"),
    Mutant(
        "bottleneck",
        "the input read where the output is",
        "if self.parallel else layer.mix(y,",
        "if not self.parallel else layer.mix(y,",
        place="outputs/bottleneck.py",
    ),
    Mutant(
        "bottleneck",
        "bias of the down-projection forgotten",
        "shifted(layer, narrow, self.adapter_down.bias)",
        "narrow",
        place="outputs/bottleneck.py",
    ),
    Mutant(
        "compacter",
        "Kronecker factors swapped",
        '"ipq,iar,irb->paqb"',
        '"ipq,iar,irb->apbq"',
        place="outputs/compacter.py",
    ),
    Mutant(
        "compacter",
        "bias of the up-projection forgotten",
        "shifted(layer, layer.mix(self.dropout(narrow), up.matrix(A)), up.bias)",
        "layer.mix(narrow, up.matrix(A))",
        place="outputs/compacter.py",
    ),
    Mutant(
        "poly",
        "forgotten rank",
        "(update.reshape(y.shape) / self.r)",
        "update.reshape(y.shape)",
        place="outputs/poly.py",
    ),
    Mutant(
        "poly",
        "splits of the output in the wrong order",
        'B = torch.einsum("bqs,qsrd->brqd"',
        'B = torch.einsum("bqs,qsrd->brdq"',
        place="outputs/poly.py",
    ),
    Mutant(
        "poly",
        "softmax in place of a share",
        "weights = logits.sigmoid()",
        "weights = logits.exp()",
        place="outputs/poly.py",
    ),
    Mutant("poly", "tasks one further", "module_logits[tasks]", "module_logits[tasks - 1]", place="outputs/poly.py"),
    Mutant(
        "reft", "what was there is not taken away", " - functional.linear(y, R)) @ R", ") @ R", place="outputs/reft.py"
    ),
    Mutant(
        "reft",
        "rows not orthonormal",
        "return orthonormal_rows(self.reft_R)",
        "return self.reft_R",
        place="outputs/reft.py",
    ),
    Mutant("reft", "bias forgotten", "functional.linear(y, W, b)", "functional.linear(y, W)", place="outputs/reft.py"),
    Mutant(
        "reft",
        "counted from the end of the row",
        "count[:, -1:] - count",
        "prompt.shape[1] - 1 - torch.arange(prompt.shape[1]).expand_as(count)",
        place="outputs/places.py",
    ),
    Mutant(
        "reft", "answers are edited too", "& ((labels != IGNORED).cumsum(dim=1) == 0)", "", place="outputs/places.py"
    ),
    Mutant(
        "lily",
        "one mixture for the batch",
        "return choice.mean(dim=1)",
        "return choice.mean(dim=(0, 1))[None].expand(len(choice), -1)",
        place="outputs/lily.py",
    ),
    Mutant(
        "lily",
        "forgotten scale",
        "(self.scaling * update.reshape(y.shape))",
        "update.reshape(y.shape)",
        place="outputs/lily.py",
    ),
    Mutant("lily", "an A of its own for each layer", "index % config.stride_A == 0", "True", place="outputs/lily.py"),
    Mutant(
        "c3a",
        "blocks turned the other way, both",
        "(step - step[:, None]) % len",
        "(step[:, None] - step) % len",
        place="factors.py",
    ),
    Mutant(
        "c3a",
        "an embedding's columns turned the other way",
        "x[..., None] - torch.arange",
        "x[..., None] + torch.arange",
    ),
    Mutant("c3a", "divided by the outputs", "layer.in_features, layer.kind\n", "layer.out_features, layer.kind\n"),
    Mutant("fourierft", "forgotten scale, both ways", "* self.fourierft_scaling  #", "#"),
    Mutant("fourierft", "no mirror image", "(2 * columns <= width) != (2 * rows > height)", "2 * columns <= width"),
    Mutant("fourierft", "half counted once", "torch.where(alone, 1.0, 0.5)", "torch.ones(len(alone))"),
    Mutant(
        "fourierft",
        "rows and columns changed",
        "drawn // columns, drawn % columns",
        "drawn // rows, drawn % rows",
        place="factors.py",
    ),
    Mutant("waveft", "forgotten scale, both ways", " * self.waveft_scaling", ""),
    Mutant("waveft", "bands not changed", "row % m + column // n * m, column % n + row // m * n", "row, column"),
    Mutant("waveft", "mirror without its signs", "(-1) ** place * value", "value", place="wavelets.py"),
    Mutant("waveft", "one entry late", "- (len(taps) - 2)", "- (len(taps) - 1)", place="wavelets.py"),
    Mutant("peanut", "forgotten scale, forward", "y + self.scaling * layer.mix", "y + layer.mix"),
    Mutant("peanut", "residuals from the wrong end", "residuals.pop()", "residuals.pop(0)"),
    Mutant("peanut", "activation left out after A", "z = act(self.peanut_A", "z = (self.peanut_A"),
    Mutant("peanut", "an embedding's own factor left in", "(y / factor)", "(y)"),
    Mutant("shira", "places not in the order of a mask", "seed, in_order=True)", "seed, in_order=False)"),
    Mutant("shira", "forgotten strength, forward", "x, self.scaling * v, *self", "x, v, *self"),
    Mutant("shira", "forgotten strength, dense", "+ columns, self.scaling * v)", "+ columns, v)"),
    Mutant("shira", "a mask in the layout of the layer", "layer.matrix(mask).nonzero()", "mask.flatten(1).nonzero()"),
    Mutant(
        "shira",
        "gradient of the wrong entries",
        "(outputs @ inputs.T)[rows, columns]",
        "(outputs @ inputs.T).flatten()[: len(rows)]",
        place="factors.py",
    ),
]
