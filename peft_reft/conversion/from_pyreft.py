"""pyreft's checkpoints, as its `save` and its trainer's `save_intervention` write them.

    intkey_<place>.bin  a pickle of the weights of one intervention
    config.json         the places in order and the classes of the interventions; not written by `save_intervention`
    pytorch_model.bin   with `include_model`: the trained weights of the base model, a classifier head for example
    args.json           the options of a run, positions included; written by pyreft's own training script

Where first and last tokens have weights of their own, a module has two interventions, and the first half of all
interventions is for the first tokens. The files don't say the positions, nor, without a config.json, which of two
edits with the same weights it is: the caller gives these.

Dimensions: R rank, D width.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..tuner.interventions.formulas import INTERVENTIONS
from ..tuner.positions.spec import POSITION_EXAMPLES, PositionSpec
from .base_model import load_base_model, name_of_base
from .checkpoint import Checkpoint, Conversion, Weights, settle, write_adapter
from .files import read_json, read_tensors
from .householder import basis_of
from .pyvene_places import Place


# Fields of a place in config.json, in pyvene's order. Those of EMPTY are None in all of pyreft's own interventions.
FIELDS = (
    "layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type", "intervention",
    "subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation",
    "hidden_source_representation", "latent_dim",
)  # fmt: skip
EMPTY = (
    "subspace_partition",
    "intervention_link_key",
    "moe_key",
    "source_representation",
    "hidden_source_representation",
)

ORIGINAL = "rotate_layer.parametrizations.weight.original"
BASE = "rotate_layer.parametrizations.weight.0.base"
SIZES = ("embed_dim", "interchange_dim")  # numbers that pyvene saves among the weights


def convert_pyreft(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    base_model: str | None = None,
    positions: str | None = None,
    *,
    intervention: str | None = None,
    act_fn: str | None = None,
    dropout: float | None = None,
    task_type: str | None = None,
    with_head: bool = True,
    args_file: str | os.PathLike | None = None,
) -> Conversion:
    """Make a PEFT adapter of a checkpoint of pyreft, with pyreft's logits in float32 on the same prompts.

    Settings that pyreft does not save are arguments here, or are read from the `args.json` of pyreft's script.

    Args:
        folder (`str` or `os.PathLike`): The folder that `ReftModel.save` or `save_intervention` wrote.
        out (`str` or `os.PathLike`): A new folder for the adapter.
        base_model (`str`, *optional*): Folder or hub name of the base model. Its config is read, not its weights.
            None: the one that args.json names.
        positions (`str`, *optional*): The positions of the training run: `"f7+l7"`, `"f3"`, `"l1"`, or `"all"` where
            pyreft was run without locations. None: those in args.json.
        intervention (`str`, *optional*): The edit, by its name in ReftConfig. Needed without a config.json, where two
            edits have the same weights.
        act_fn (`str`, *optional*): The activation function that the interventions were made with. None: that in
            args.json, else none, pyreft's default.
        dropout (`float`, *optional*): The dropout, for further training. None: that in args.json, else 0.
        task_type (`str`, *optional*): The task that the base model was loaded for, `"SEQ_CLS"` for example. None: the
            class that the base model's config names.
        with_head (`bool`): Whether to take the trained weights of the base model along, as `modules_to_save`.
        args_file (`str` or `os.PathLike`, *optional*): The run's args.json, if it does not lie in the folder.

    Returns:
        `Conversion`: The folder, the adapter's config, and notes: what the files did not say, and what differs.

    Raises:
        ValueError: when a file holds anything but tensors, when a setting is missing or contradicts a file, or when a
            place is not the output of a module. Nothing is written then.
    """
    folder = Path(folder)
    options, where = _options(folder, args_file)
    # The user may name another folder than args.json does: the base model may have moved since.
    base_model = name_of_base(base_model, options.get("model"), folder)
    positions = settle("positions", positions, options.get("position"), where)
    if not positions:
        raise ValueError(
            f"positions=None: pyreft does not save its positions, and there is no args.json in {folder}. Give what "
            f"the lists of positions were made from (--positions): {POSITION_EXAMPLES}."
        )
    spec = PositionSpec.parse(positions)
    kind = settle("intervention", intervention, _name_of_class(options.get("intervention_type"), where), where)
    if kind is not None and kind not in INTERVENTIONS:
        raise ValueError(f"intervention={kind!r} is not allowed. Allowed: {', '.join(INTERVENTIONS)}.")
    base = load_base_model(base_model, task_type)
    places, kind_in_config = _places(folder)
    kind = settle("intervention", kind, kind_in_config, folder / "config.json")
    weights = {place.key: read_tensors(folder / f"intkey_{place.key}.bin") for place in places}
    checkpoint = Checkpoint(str(folder), _intervention(folder, weights, kind), {})
    checkpoint.act_fn = settle("act_fn", act_fn, options.get("act_fn"), where)
    checkpoint.dropout = settle("dropout", dropout, options.get("dropout"), where) or 0.0
    checkpoint.share_weights = options.get("share_weights") if spec.two_sided else None
    modules = [place.module(base.model_class, base.modules) for place in places]
    for place, module in zip(places, modules):
        own = _weights_of(checkpoint, weights[place.key], f"intkey_{place.key}.bin")
        checkpoint.modules.setdefault(module, []).append(own)
    _check_order(checkpoint, modules, folder)
    if with_head and (folder / "pytorch_model.bin").exists():
        checkpoint.head = read_tensors(folder / "pytorch_model.bin")
    _note(checkpoint, spec, weights, options)
    return write_adapter(checkpoint, base, positions, out)


def _weights_of(checkpoint: Checkpoint, tensors: dict[str, Tensor], file: str) -> Weights:
    """R, W and b of one intervention, from the tensors of its file.

    Raises:
        ValueError: when tensors are missing or unknown, or when W and b can't express the bias of the projection.
    """
    tensors = {name: value for name, value in tensors.items() if name not in SIZES}
    kind = checkpoint.intervention
    names: tuple[str, ...]
    if kind == "loreft":
        names = ("rotate_layer", "weight", "bias")
    elif kind in ("noreft", "nodireft"):
        names = ("proj_layer.weight", "learned_source.weight", "learned_source.bias")
    elif kind == "direft":
        names = (ORIGINAL, BASE, "learned_source.weight", "learned_source.bias")
    else:
        names = (ORIGINAL, BASE, "learned_source")
    optional = {"proj_layer.bias"} if "proj_layer.weight" in names else set()
    missing, unknown = set(names) - tensors.keys(), tensors.keys() - set(names) - optional
    if missing or unknown:
        raise ValueError(
            f"{checkpoint.source}: {file} has the tensors {sorted(tensors)}, and intervention={kind!r} has "
            f"{sorted(names)}. The intervention is another, or the file is not pyreft's."
        )
    R_RD = tensors[names[0]]
    if names[0] == "rotate_layer":
        R_RD = R_RD.mT
    elif names[0] == ORIGINAL:
        R_RD = basis_of(R_RD, tensors[BASE])
    W_RD, b_R = (
        (tensors[names[-2]], tensors[names[-1]]) if INTERVENTIONS[kind].has_source else (None, tensors[names[-1]])
    )
    p_R = tensors.get("proj_layer.bias")
    if p_R is not None and kind == "noreft" and bool(p_R.any()):
        # pyreft computes h + Rᵀ(act(Wh + b) − (Rh + p)), p the projection's bias. Without act, that is a b of b − p.
        if checkpoint.act_fn not in (None, "linear"):
            raise ValueError(
                f"{checkpoint.source}: {file} has a bias of its projection (add_bias=True) that is not 0, behind "
                f"act_fn={checkpoint.act_fn!r}. act(Wh + b) − Rh has no place for it, so that can't be converted."
            )
        b_R = b_R - p_R
    return Weights(R_RD, W_RD, b_R)


def _options(folder: Path, args_file: str | os.PathLike | None) -> tuple[dict[str, Any], Path]:
    """The contents of args.json and its path. Empty where there is none and none was asked for."""
    path = Path(args_file) if args_file is not None else folder / "args.json"
    if args_file is None and not path.exists():
        return {}, path
    return read_json(path), path


def _places(folder: Path) -> tuple[list[Place], str | None]:
    """The places of the interventions, those for first tokens first, and the edit of all (None: no config.json)."""
    files = sorted(path.name.removeprefix("intkey_").removesuffix(".bin") for path in folder.glob("intkey_*.bin"))
    if not files:
        inner = folder / "intervenable_model"
        raise ValueError(
            f"{folder} has no intkey_*.bin, so it is no checkpoint of pyreft."
            + (f" Its trainer's checkpoint is {inner}." if inner.is_dir() else "")
        )
    path = folder / "config.json"
    if not path.exists():
        places = [Place.parse(name) for name in files]
        return sorted(places, key=lambda place: place.turn), None
    config = read_json(path)
    if config.get("mode", "parallel") != "parallel":
        raise ValueError(
            f"{path}: mode={config['mode']!r} runs one intervention's output into the next. Allowed: 'parallel'."
        )
    places = []
    for index, values in enumerate(config.get("representations") or ()):
        known = dict(zip(FIELDS, values)) if isinstance(values, list) else dict(values)
        for name in EMPTY:
            if known.get(name) is not None:
                raise ValueError(
                    f"{path}: {name}={known[name]!r} of representation {index} is not known here. pyreft's own "
                    "interventions do without it."
                )
        place = Place(
            str(known["component"]),
            known.get("layer"),
            known.get("unit", "pos"),
            str(known.get("max_number_of_units", 1)),
        )
        turn = sum(other.key.rpartition("#")[0] == place.key.rpartition("#")[0] for other in places)
        places.append(Place(place.component, place.layer, place.unit, place.count, turn))
    keys = [place.key for place in places]
    if sorted(keys) != files:
        differing = sorted(set(keys) ^ set(files))
        raise ValueError(
            f"{folder}: config.json and the files intkey_*.bin are not of one checkpoint: only one of both has "
            f"{differing[0]!r}."
        )
    order = config.get("sorted_keys") or keys
    if sorted(order) != files:
        raise ValueError(f"{path}: sorted_keys does not list the same interventions as representations.")
    types = config.get("intervention_types") or []
    classes = {str(name) for name in ([types] if isinstance(types, str) else types)}
    names = sorted(str(_name_of_class(name, path)) for name in classes)
    if len(names) > 1:
        raise ValueError(f"{path} has interventions of several kinds: {', '.join(names)}. An adapter has one.")
    return sorted(places, key=lambda place: order.index(place.key)), names[0] if names else None


def _name_of_class(name: object, where: Path) -> str | None:
    """`loreft` for `<class 'pyreft.interventions.LoreftIntervention'>`, or for the class's name alone."""
    if name is None:
        return None
    match = re.fullmatch(r"(?:<class 'pyreft\.interventions\.)?(\w+)Intervention(?:'>)?", str(name))
    if match is None or match[1].lower() not in INTERVENTIONS:
        own = ", ".join(f"{kind.title()}Intervention" for kind in INTERVENTIONS)
        raise ValueError(
            f"{where}: the intervention {name} is none of pyreft's: {own}. What a class of one's own computes can't "
            "be known from its weights."
        )
    return match[1].lower()


def _intervention(folder: Path, weights: dict[str, dict[str, Tensor]], kind: str | None) -> str:
    """The edit's name in ReftConfig: `kind`, where that is known, else the only edit with tensors of these names."""
    fitting = sorted(set.intersection(*(_kinds_of(tensors) for tensors in weights.values())))
    if kind is None and len(fitting) != 1:
        raise ValueError(
            f"intervention=None: the weights in {folder} are those of "
            f"{' or '.join(fitting) or 'no intervention of pyreft'}, and there is no config.json to tell."
            + (f" Say which it is, for example intervention={fitting[0]!r} (--intervention)." if fitting else "")
        )
    return fitting[0] if kind is None else kind


def _kinds_of(tensors: dict[str, Tensor]) -> set[str]:
    """The edits that have tensors of these names."""
    if "rotate_layer" in tensors:
        return {"loreft"}
    if "proj_layer.weight" in tensors:
        return {"noreft", "nodireft"}
    if ORIGINAL in tensors:
        return {"consreft", "lobireft"} if "learned_source" in tensors else {"direft"}
    return set()


def _check_order(checkpoint: Checkpoint, modules: list[str], folder: Path) -> None:
    """With two sets of weights, each half of the interventions must edit the same modules: pyreft takes the first half
    for the first tokens."""
    half = len(modules) // 2
    in_pairs = any(len(sets) == 2 for sets in checkpoint.modules.values())
    if in_pairs and sorted(modules[:half]) != sorted(modules[half:]):
        raise ValueError(
            f"{folder}: of {len(modules)} interventions, the first half, which pyreft gives the first tokens, edits "
            f"{modules[:half]}, and the second {modules[half:]}. They must be the same modules."
        )


def _note(
    checkpoint: Checkpoint, spec: PositionSpec, weights: dict[str, dict[str, Tensor]], options: dict[str, Any]
) -> None:
    """Add to the notes: what the files did not say, and where logits may differ from pyreft's."""
    notes = checkpoint.notes
    if INTERVENTIONS[checkpoint.intervention].has_source and checkpoint.act_fn is None and "act_fn" not in options:
        notes.append(
            "act_fn: pyreft does not save it. Taken for none, its default; give act_fn (--act-fn) if there was one."
        )
    if spec.first != spec.last and not spec.all_tokens:
        count = 2 * max(spec.first, spec.last)
        notes.append(
            f"positions={spec}: on prompts of fewer than {count} tokens pyreft edits at most half of them from each "
            "side, and a PEFT adapter may edit more (docs/converting.md)."
        )
    dtypes = {
        str(value.dtype).removeprefix("torch.")
        for tensors in weights.values()
        for name, value in tensors.items()
        if name not in SIZES
    } - {"float32"}
    if dtypes:
        notes.append(
            f"weights in {', '.join(sorted(dtypes))} were made float32. The edit is computed in float32, where pyreft "
            "computes in the dtype of the weights: logits agree as far as that dtype goes."
        )
    if checkpoint.intervention == "nodireft" and any("proj_layer.bias" in tensors for tensors in weights.values()):
        notes.append("proj_layer.bias was left out: pyreft's nodireft has it (add_bias) and computes without it.")
