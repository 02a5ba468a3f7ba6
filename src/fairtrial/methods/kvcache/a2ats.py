"""A²ATS: attention to the few tokens whose keys look promising in a codebook (He et al. 2025, arXiv:2502.12665).

For each query only a few per cent of the cached tokens take part in attention, besides the first ones (sinks) and the
last ones (window). They are found by approximate scores. Beyond the window all tokens are scored as if they stood at
one distance b (windowed rotary position embedding), with keys k from before their rotary embedding, of which only the
number of a codeword c is looked up:

    score = (R_b q)·c / √d ≈ (R_b q)·k / √d.

Codewords preserve these products rather than the keys: minimising E (q̃·(k - c))² = (k - c)ᵀ H (k - c), with H = E q̃ q̃ᵀ
over the rotated queries q̃ = R_b q of all heads that share the key, and H = L Lᵀ, is ordinary k-means on rows k L.
Each query takes the best ⌊top_ratio · tokens⌋; heads that share their keys attend to the union of what they take, with
exact scores.

The prompt, which is what comes first, is read with exact attention, as in the authors' code. There every later token
comes by itself; here several that come together are each treated as they would be alone. That code also keeps the
Cholesky factor in bfloat16, here it is in float32; and where fewer tokens lie between sinks and window than are wanted,
all of them are taken, where it fails. As in its `llama_masked`, the others are masked out: exact keys and values of all
tokens are held, and what is saved is what a faster memory would have to deliver, not room.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fairtrial.methods.arguments import require
from fairtrial.methods.kvcache.attention import AttendingCache
from fairtrial.methods.kvcache.held import HeldLayer, Shape, check_crop, joined, last_removed, shape_of
from fairtrial.methods.kvcache.rotary import turned
from fairtrial.methods.registry import LogUniform, method
from fairtrial.methods.whole import whole

JITTER = 1e-6
MOST_CODES, TOKENS_PER_CODE = 4096, 20  # the authors' 4096 codewords from 64k tokens of text and 16k of random strings


def query_factor(gram: Float[Tensor, "*k d d"], jitter: float = JITTER) -> Float[Tensor, "*k d d"]:
    """The lower triangular L with L Lᵀ = H + jitter · I, for a sum of q̃ q̃ᵀ scaled to H with a root mean square of 1.

    Raises:
        ValueError: the sum is not finite or all 0, or has no factor even so.
    """
    size = gram.square().mean((-2, -1), keepdim=True).sqrt()
    fits = bool((size.isfinite() & (size > 0)).all())
    require(fits, "queries", "others", "finite, and not all 0")
    scaled = gram / size + jitter * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor: Tensor
    factor, wrong = torch.linalg.cholesky_ex(scaled)
    require(not bool(wrong.any()), "queries", f"a sum of squares with no Cholesky factor at jitter {jitter}", "others")
    return factor


def train_codebook(
    keys: Float[Tensor, "n d"],
    factor: Float[Tensor, "d d"],
    n_codes: int,
    generator: torch.Generator,
    *,
    max_iter: int = 300,
    tol: float = 1e-4,
) -> Float[Tensor, "c d"]:
    """Centres of k-means++ on the rows k L, in that space.

    Args:
        keys: before their rotary embedding.
        factor: L; the identity gives a codebook of the keys themselves.
        n_codes: codewords, at most as many as keys.
        generator: k-means is seeded from it.
        max_iter: of k-means.
        tol: k-means ends where its centres move less, relative to the variance.

    Raises:
        ValueError: there are fewer keys than codewords, or keys are not finite.
    """
    from sklearn.cluster import KMeans

    fits = whole(n_codes, 1, len(keys))
    require(fits, "n_codes", n_codes, f"a whole number from 1 to {len(keys)}, the number of keys")
    require(whole(max_iter, 1), "max_iter", max_iter, "a whole number of at least 1")
    require(tol >= 0, "tol", tol, "at least 0")
    require(bool(keys.isfinite().all()), "keys", "others", "finite")
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    rows = (keys.float() @ factor.float()).cpu().numpy()
    found = KMeans(n_codes, n_init=1, max_iter=max_iter, tol=tol, random_state=seed).fit(rows)
    return torch.from_numpy(found.cluster_centers_).to(factor)


def train_query_aware_codebook(
    keys: Float[Tensor, "n d"],
    queries: Float[Tensor, "m d"],
    n_codes: int,
    generator: torch.Generator,
    *,
    max_iter: int = 300,
    tol: float = 1e-4,
) -> tuple[Float[Tensor, "c d"], Float[Tensor, "d d"]]:
    """Codewords c' = c L that preserve products with the queries, and L.

    Args:
        keys: before their rotary embedding.
        queries: rotated to the fixed distance, of all heads that share the keys.
        n_codes, generator, max_iter, tol: as for `train_codebook`.

    The defaults are the authors'.

    Raises:
        ValueError: as `query_factor` and `train_codebook` do.
    """
    factor = query_factor(queries.float().mT @ queries.float())
    return train_codebook(keys, factor, n_codes, generator, max_iter=max_iter, tol=tol), factor


def assign_codes(
    keys: Float[Tensor, "*b n d"], codebook: Float[Tensor, "*#b c d"], factor: Float[Tensor, "*#b d d"]
) -> Int[Tensor, "*b n"]:
    """The number of the codeword c' that is nearest to k L."""
    rows = keys.to(codebook) @ factor
    return (codebook.square().sum(-1)[..., None, :] - 2 * rows @ codebook.mT).argmin(-1)


def codewords(codebook: Float[Tensor, "*b c d"], factor: Float[Tensor, "*b d d"]) -> Float[Tensor, "*b c d"]:
    """c = c' L⁻¹."""
    found: Tensor = torch.linalg.solve_triangular(factor, codebook, upper=False, left=False)
    return found


def approx_scores(
    query: Float[Tensor, "*b h q d"], codes: Int[Tensor, "*b k n"], words: Float[Tensor, "*#b k c d"]
) -> Float[Tensor, "*b h q n"]:
    """q̃·c / √d of every token's codeword.

    Args:
        query: rotated to the fixed distance, of h heads, a multiple of k.
        codes: of the tokens, for each of k heads of keys.
        words: `codewords` of each head of keys.
    """
    grouped = query.to(words).unflatten(-3, (words.shape[-3], -1))
    by_word = grouped @ words.mT[..., None, :, :] / math.sqrt(query.shape[-1])
    index = codes.long()[..., None, None, :].expand(*by_word.shape[:-1], -1)
    found: Tensor = by_word.gather(-1, index)
    return found.flatten(-4, -3)


def select_tokens(
    scores: Float[Tensor, "*b h n"],
    top_ratio: float = 0.03,
    *,
    window: int = 64,
    sink: int = 8,
    groups: int = 1,
    visible: Bool[Tensor, "*#b 1 n"] | None = None,
) -> Bool[Tensor, "*b h n"]:
    """Which tokens a query attends to: the first, the last, and those that score best for a head of its group.

    Args:
        scores: of one query in h heads; of tokens with equal scores, as those of one codeword, the earlier win.
        top_ratio: how many of the other tokens each head takes, as a share of all that the query sees, rounded down;
            within (0, 1].
        window: last tokens, the query's own among them, that are always attended to.
        sink: first tokens that are always attended to.
        groups: successive heads that share their keys, and so what they attend to.
        visible: which tokens the query sees at all, by default all.

    The defaults are the authors'.

    Raises:
        ValueError: an argument lies outside its range.
    """
    require(0 < top_ratio <= 1, "top_ratio", top_ratio, "within (0, 1]")
    require(whole(window, 1), "window", window, "a whole number of at least 1")
    require(whole(sink, 0), "sink", sink, "a whole number of at least 0")
    heads, tokens = scores.shape[-2:]
    require(whole(groups, 1) and heads % groups == 0, "groups", groups, f"a divisor of {heads} heads")
    visible = torch.ones((1, tokens), dtype=torch.bool, device=scores.device) if visible is None else visible
    seen = visible.cumsum(-1)
    length = seen[..., -1:]
    always = visible & ((seen <= sink) | (seen > length - window))
    eligible = visible & ~always
    wanted = torch.minimum((length.double() * top_ratio).floor().long(), eligible.sum(-1, keepdim=True))
    most = int(wanted.max())
    ranked = scores.masked_fill(~eligible, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    best = ranked[..., :most]
    taken = torch.zeros_like(scores, dtype=torch.bool)
    places = torch.arange(most, device=scores.device)
    taken.scatter_(-1, best, (places < wanted).expand(best.shape))
    shared: Tensor = taken.unflatten(-2, (-1, groups)).any(-2).repeat_interleave(groups, -2)
    return shared | always


class Rotation:
    """Turns of queries and keys by the model's own rotary embeddings.

    Args:
        model: of transformers, with one module of rotary embeddings for all layers.

    Raises:
        ValueError: it has none, or several.
    """

    def __init__(self, model: nn.Module) -> None:
        found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
        fits = len(found) == 1 and hasattr(found[0], "inv_freq")
        require(fits, "model", type(model).__name__, "one with the same rotary embeddings in all layers")
        self._angles = found[0]

    def at(
        self, positions: Int[Tensor, "b t"], like: Tensor
    ) -> tuple[Float[Tensor, "b 1 t r"], Float[Tensor, "b 1 t r"]]:
        """Cosines and sines of positions."""
        cos, sin = self._angles(like, positions)
        return cos[:, None], sin[:, None]


def unrotated(
    x: Float[Tensor, "b h t d"], cos: Float[Tensor, "#b 1 t r"], sin: Float[Tensor, "#b 1 t r"]
) -> Float[Tensor, "b h t d"]:
    """What queries or keys were before their rotary embedding."""
    x, cos, sin = x.float(), cos.float(), sin.float()
    length = cos.square() + sin.square()  # not 1 where the embedding also scales
    return turned(x, cos / length, -sin / length)


def rotate_query(query: Float[Tensor, "b h t d"], position: int, rotation: Rotation) -> Float[Tensor, "b h t d"]:
    """R_b q̃: queries from before their rotary embedding, all turned as at one position."""
    places = torch.full((1, query.shape[2]), position, device=query.device)
    cos, sin = rotation.at(places, query)
    return turned(query, cos.to(query), sin.to(query))


def for_lookup(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b k n d"],
    positions: Int[Tensor, "_ t"],
    rotation: Rotation,
    offset: int | None,
) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b k t d"]]:
    """The queries that codewords are multiplied with, and the last t keys as they are looked up in a codebook."""
    new = key[:, :, key.shape[2] - query.shape[2] :]
    if offset is None:
        return query, new
    cos, sin = rotation.at(positions, query)
    return rotate_query(unrotated(query, cos, sin), offset, rotation), unrotated(new, cos, sin)


@dataclass
class Codebooks:
    """What the keys of every layer are looked up in.

    Attributes:
        codes: of each layer, c' for each of k heads, (k, c, d).
        factors: of each layer, L for each head, (k, d, d).
        offset: the distance b that they were trained for; None if they are of keys and queries as they are rotated.
    """

    codes: Sequence[Float[Tensor, "k c d"]]
    factors: Sequence[Float[Tensor, "k d d"]]
    offset: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of all codebooks and factors."""
        return sum(tensor.nbytes for tensor in (*self.codes, *self.factors))

    def words(self) -> list[Float[Tensor, "k c d"]]:
        """The `codewords` of each layer."""
        return [codewords(*book) for book in zip(self.codes, self.factors, strict=True)]


class _Seen(AttendingCache):
    """Notes keys and rotated queries of what a model reads, and holds nothing else."""

    def __init__(self, config: Any, rotation: Rotation, offset: int | None) -> None:
        n_layers, heads, width = shape_of(config)
        super().__init__([VQKeyLayer(heads, width) for _ in range(n_layers)])
        self.rotation, self.offset = rotation, offset
        self.keys: list[list[Tensor]] = [[] for _ in range(n_layers)]
        self.grams = [torch.zeros(heads, width, width) for _ in range(n_layers)]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        number: int = module.layer_idx  # type: ignore[assignment]
        far, keys = for_lookup(query, key, options["position_ids"], self.rotation, self.offset)
        self.keys[number].append(keys.float().transpose(0, 1).flatten(1, 2))
        rows = far.float().unflatten(1, (key.shape[1], -1)).transpose(0, 1).flatten(1, 3)
        self.grams[number] = self.grams[number].to(rows) + rows.mT @ rows
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


@torch.no_grad()
def train_codebooks(
    model: Any,
    calibration: Iterable[Int[Tensor, "_ _"]],
    generator: torch.Generator,
    *,
    n_codes: int | None = None,
    offset: int | None = 2048,
    query_aware: bool = True,
    max_iter: int = 300,
) -> Codebooks:
    """Codebooks for all layers and heads of a model.

    Args:
        model: a causal language model of transformers, with full attention and the same rotary embeddings everywhere.
        calibration: token ids (b, t) without padding; the authors take 64k tokens of web text and 16k of random
            strings.
        generator: k-means is seeded from it.
        n_codes: of each head; by default one for 20 tokens of calibration, at most 4096, as the authors have it.
        offset: the distance at which tokens beyond the window are scored; None scores them where they stand, and
            clusters keys after their rotary embedding.
        query_aware: False clusters the keys themselves.
        max_iter: of k-means.

    Raises:
        ValueError: an argument lies outside its range, the model is not like that, or there are fewer tokens than
            codewords.
    """
    require(offset is None or whole(offset, 0), "offset", offset, "a whole number of at least 0")
    require(n_codes is None or whole(n_codes, 1), "n_codes", n_codes, "a whole number of at least 1")
    require(whole(max_iter, 1), "max_iter", max_iter, "a whole number of at least 1")
    rotation = Rotation(model)
    seen = _Seen(model.config, rotation, offset)
    for ids in calibration:
        with seen.attached_to(model):
            model(ids, past_key_values=seen, use_cache=True, logits_to_keep=1)
        seen.reset()
    tokens = sum(keys.shape[1] for keys in seen.keys[0])
    n_codes = min(MOST_CODES, tokens // TOKENS_PER_CODE) if n_codes is None else n_codes
    require(1 <= n_codes <= tokens, "n_codes", n_codes, f"from 1 to {tokens}, the number of tokens to calibrate with")
    codes, factors = [], []
    for parts, gram in zip(seen.keys, seen.grams, strict=True):
        keys = torch.cat(parts, 1)
        parts.clear()
        identity = torch.eye(gram.shape[-1], device=gram.device).expand_as(gram)
        factor = query_factor(gram) if query_aware else identity.clone()
        trained = [
            train_codebook(rows, by, n_codes, generator, max_iter=max_iter)
            for rows, by in zip(keys, factor, strict=True)
        ]
        codes.append(torch.stack(trained))
        factors.append(factor)
    return Codebooks(codes, factors, offset)


class VQKeyLayer(HeldLayer):
    """Keys and values of all tokens as they are, and the numbers of the keys' codewords."""

    parts: ClassVar = ("keys", "values", "codes")
    is_croppable = True
    codes: Tensor | None

    def shapes(self, number: int) -> list[dict[str, Shape]]:
        exact: Shape = ("sequences", self.heads, "tokens", self.width)
        return [{"keys": exact, "values": exact, "codes": exact[:3]}]

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = joined([self.keys, key_states]), joined([self.values, value_states])
        self.is_initialized = True
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        tokens = check_crop(tokens_to_remove, self.get_seq_length())
        self.keys, self.values = last_removed(self.keys, tokens), last_removed(self.values, tokens)
        if tokens and self.codes is not None:
            left = self.codes.shape[-1] - tokens
            self.codes = self.codes[..., :left].clone() if left else None


class VQKeyCache(AttendingCache):
    """A cache in which what follows the prompt attends to a few tokens that a codebook picks.

    To be used within `with cache.attached_to(model):`. The first tokens that it is handed are the prompt, which is read
    with exact attention. With `top_ratio` 1, or while all tokens lie within the window, attention is exact throughout.
    Sequences of a batch and padding on the left are allowed; padding counts neither as sink nor towards the length.

    Args:
        model: a causal language model of transformers, with full attention and the same rotary embeddings everywhere.
        codebooks: as `train_codebooks` gives them for this model; they count among the cache's bytes.
        top_ratio, window, sink: as for `select_tokens`.

    The defaults are the authors'.

    Raises:
        ValueError: an argument lies outside its range, or the codebooks belong to another model.
    """

    def __init__(
        self, model: Any, codebooks: Codebooks, *, top_ratio: float = 0.03, window: int = 64, sink: int = 8
    ) -> None:
        n_layers, heads, width = shape_of(model.config)
        shapes = {(len(codebooks.codes), *(books.shape[0], books.shape[2])) for books in codebooks.codes}
        require(shapes == {(n_layers, heads, width)}, "codebooks", sorted(shapes), f"for {(n_layers, heads, width)}")
        select_tokens(torch.zeros(1, 1), top_ratio, window=window, sink=sink)
        super().__init__([VQKeyLayer(heads, width) for _ in range(n_layers)])
        self.codebooks, self.top_ratio, self.window, self.sink = codebooks, top_ratio, window, sink
        self._rotation: Rotation | None = None
        self._words: list[Tensor] = []
        self.settings = {
            "top_ratio": top_ratio,
            "window": window,
            "sink": sink,
            "offset": codebooks.offset,
            "codes": [books.shape[1] for books in codebooks.codes],
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds, the codebooks among them."""
        return super().nbytes + self.codebooks.nbytes

    @contextmanager
    def attached_to(self, model: nn.Module) -> Iterator[None]:
        with super().attached_to(model):
            try:
                self._rotation, self._words = Rotation(model), self.codebooks.words()
                yield
            finally:
                self._rotation, self._words = None, []

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_rotation": None, "_words": []}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"codebooks": self._books()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.codebooks = Codebooks(**state["codebooks"], offset=self.codebooks.offset)
        if self._rotation is not None:
            self._words = self.codebooks.words()

    def check_state(self, state: Mapping[str, Any]) -> dict[str, int]:
        sizes = super().check_state(state)
        require("codebooks" in state, "state", sorted(state), f"what a {type(self).__name__} has saved, with codebooks")
        books = state["codebooks"]
        found, wanted = (
            {name: [tuple(tensor.shape) for tensor in each.get(name, ())] for name in ("codes", "factors")}
            for each in (books, self._books())
        )
        require(found == wanted, "codebooks of the state", found, f"of the shapes {wanted}")
        return sizes

    def _books(self) -> dict[str, list[Tensor]]:
        return {"codes": list(self.codebooks.codes), "factors": list(self.codebooks.factors)}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        mask = self.selected(module, query, key, attention_mask, **options)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    @torch.no_grad()
    def selected(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, **options: Any
    ) -> Tensor | None:
        """The mask of the tokens that the queries of a layer attend to; numbers of new keys are held on the way."""
        number: int = module.layer_idx  # type: ignore[assignment]
        layer: VQKeyLayer = self.layers[number]
        positions = options.get("position_ids")
        if self._rotation is None or positions is None:
            raise RuntimeError("the model's attention layers do not say at which positions their queries are")
        books = self.codebooks.codes[number], self.codebooks.factors[number]
        new, tokens = query.shape[2], key.shape[2]
        far, new_keys = for_lookup(query, key, positions, self._rotation, self.codebooks.offset)
        codes = assign_codes(new_keys, *(book[None] for book in books))
        narrow = torch.int16 if books[0].shape[1] <= 2**15 else torch.int32
        layer.codes = codes.to(narrow) if layer.codes is None else torch.cat([layer.codes, codes.to(narrow)], -1)
        if new == tokens:  # the prompt
            return mask
        scores = approx_scores(far, layer.codes, self._words[number][None])
        if mask is None:
            visible = torch.ones((new, tokens), dtype=torch.bool, device=key.device).tril(tokens - new)[None]
        else:
            visible = mask[:, 0, :, :tokens] if mask.dtype == torch.bool else mask[:, 0, :, :tokens] == 0
        taken = select_tokens(
            scores.transpose(1, 2),
            self.top_ratio,
            window=self.window,
            sink=self.sink,
            groups=query.shape[1] // key.shape[1],
            visible=visible[:, :, None],
        )
        return taken.transpose(1, 2)


@method(
    paper="a2ats",
    slot="cache",
    search={"top_ratio": LogUniform(0.01, 0.3)},
    bind=lambda setting: {
        "model": setting.model,
        "calibration": setting.calibration,
        "generator": setting.generator,
        "max_iter": 25,
    },
)
def A2ATSCache(  # noqa: N802
    model: Any,
    calibration: Iterable[Int[Tensor, "_ _"]],
    generator: torch.Generator,
    *,
    n_codes: int | None = None,
    offset: int = 2048,
    top_ratio: float = 0.03,
    window: int = 64,
    sink: int = 8,
    max_iter: int = 300,
) -> VQKeyCache:
    """A `VQKeyCache` with codebooks trained for the model, which takes longer than a cache usually does.

    Args:
        model, calibration, generator, n_codes, offset, max_iter: as for `train_codebooks`.
        top_ratio, window, sink: as for `select_tokens`.
    """
    select_tokens(torch.zeros(1, 1), top_ratio, window=window, sink=sink)
    books = train_codebooks(model, calibration, generator, n_codes=n_codes, offset=offset, max_iter=max_iter)
    return VQKeyCache(model, books, top_ratio=top_ratio, window=window, sink=sink)
