"""What an adversarial loss is told, on either backend, and what it asks of a program."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from probgen.adversarial.objectives import Objective, objective_of
from probgen.adversarial.penalties import GRADIENTS, PENALTIES, OrthogonalRegularization, WeightClip
from probgen.energy.settings import refuse_not_whole
from probgen.errors import ProbgenError
from probgen.program import Site, Structure


@dataclass(frozen=True)
class Adversary:
    """The arguments of `Adversarial`, and what follows from them without an array library."""

    critic: Any
    sites: tuple[str, ...] = ("x",)
    objective: str | Objective = "non-saturating"
    penalties: tuple[Any, ...] = ()
    critic_steps: int = 1
    pac: int = 1
    name: str = "critic"

    needs_guide = False
    validates = False  # what the program fools is another critic after every step

    def __post_init__(self) -> None:
        if not callable(self.critic) or inspect.isclass(self.critic):
            raise ProbgenError(
                f"Adversarial: `critic` is {self.critic!r}: give a network, a function of the arrays it sees, or a function of "
                "`spec` that builds one"
            )
        if not isinstance(self.name, str) or self.name in ("", "program"):
            raise ProbgenError(f"Adversarial: `name` is {self.name!r}: name the critic's player, other than 'program'")
        sites = (self.sites,) if isinstance(self.sites, str) else _several("sites", self.sites)
        penalties = (
            (self.penalties,) if isinstance(self.penalties, PENALTIES) else _several("penalties", self.penalties)
        )
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "penalties", penalties)
        objective_of(self.objective)
        refuse_not_whole("Adversarial", 1, critic_steps=self.critic_steps, pac=self.pac)
        if not sites or not all(isinstance(site, str) for site in sites) or len(set(sites)) < len(sites):
            raise ProbgenError(f"Adversarial: `sites` is {sites!r}: name what the critic sees, each once")
        for penalty in penalties:
            if not isinstance(penalty, PENALTIES):
                raise ProbgenError(
                    f"Adversarial: {penalty!r} is no penalty: use GradientPenalty, R1, R2, OrthogonalRegularization or WeightClip"
                )

    def __repr__(self) -> str:
        """The text that a run keeps: the critic by its name, what is at its default left out."""
        name = getattr(self.critic, "__name__", type(self.critic).__name__)
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return f"Adversarial({', '.join([name, *said])})"

    def at(self, step: Any) -> Any:
        """With the weights of its penalties as they are at `step`."""
        if not any(callable(getattr(penalty, "weight", None)) for penalty in self.penalties):
            return self
        found = copy.copy(self)
        penalties = tuple(penalty.at(step) if hasattr(penalty, "at") else penalty for penalty in self.penalties)
        object.__setattr__(found, "penalties", penalties)
        return found

    # -- what follows -------------------------------------------------------------------------------------------------

    @property
    def losses(self) -> Objective:
        """What the two players minimise."""
        return objective_of(self.objective)

    @property
    def slopes(self) -> tuple[Any, ...]:
        """The penalties on the critic's gradient."""
        return tuple(p for p in self.penalties if isinstance(p, GRADIENTS))

    @property
    def orthogonal(self) -> tuple[Any, ...]:
        """The penalties on the critic's weights."""
        return tuple(p for p in self.penalties if isinstance(p, OrthogonalRegularization))

    @property
    def project(self) -> Callable[[Any], Any] | None:
        """What is done to the critic's weights after each of its updates."""
        clips = [p for p in self.penalties if isinstance(p, WeightClip)]
        if len(clips) > 1:
            raise ProbgenError("Adversarial: `penalties` has two WeightClips: keep the narrower one")
        return clips[0].project if clips else None

    @property
    def builds(self) -> bool:
        """Whether the critic is a function of `spec` that is yet to build it."""
        if not inspect.isfunction(self.critic):
            return False
        required = [p.name for p in inspect.signature(self.critic).parameters.values() if p.default is p.empty]
        return required == ["spec"]

    # -- rows ---------------------------------------------------------------------------------------------------------

    def packed(self, values: Any) -> Any:
        """Rows side by side, [B, C, ...] → [B / pac, pac · C, ...]: the critic judges `pac` rows at once."""
        if self.pac == 1:
            return values
        values = values[: len(values) // self.pac * self.pac]  # held-out rows need be no multiple
        first = values.shape[1] if values.ndim > 1 else 1
        return values.reshape(len(values) // self.pac, self.pac * first, *values.shape[2:])

    def one_each(self, logits: Any, rows: int) -> Any:
        """The critic's logits as one number a row, [B]."""
        if logits.shape not in ((rows,), (rows, 1)):
            raise ProbgenError(
                f"Adversarial: the critic returns {tuple(logits.shape)} for {rows} rows: it must return one number a row, "
                f"[{rows}] or [{rows}, 1]"
            )
        return logits.reshape(rows)

    # -- what it asks of a program ------------------------------------------------------------------------------------

    def check(self, structure: Structure) -> None:
        """Every site is drawn, row by row, in a way that its gradient goes through."""
        if not any(name in structure.model or name in structure.guide for name in self.sites):
            raise ProbgenError(
                f"Adversarial: the program draws none of {', '.join(map(repr, self.sites))}, so real and fake rows would be one: "
                f"name a site among {', '.join(structure.model)}"
            )
        plates = [plate for site in structure.model.values() for plate in site.plates if plate.data]
        for rows in [plate.size for plate in plates][:1]:
            if rows % self.pac:
                raise ProbgenError(
                    f"Adversarial: pac={self.pac} rows are judged at once, and a batch has {rows}: give a batch_size that is "
                    f"a multiple of {self.pac}"
                )
        for name in self.sites:
            site = structure.model.get(name)
            if site is None and name not in structure.arrays:
                there = ", ".join([*structure.latents, *structure.observed, *structure.arrays])
                raise ProbgenError(
                    f"Adversarial: the program has no site or array {name!r} for the critic to see; it has {there}"
                )
            if (
                site is not None
                and site.role == "observed"
                and not {name} & (set(structure.arrays) | set(structure.guide))
            ):
                raise ProbgenError(
                    f"Adversarial: no array bears the name of the site {name!r}, so its real rows are not known: name array and "
                    "site alike"
                )
            if site is not None and not site.local:
                raise ProbgenError(
                    f"Adversarial: the site {name!r} lies outside the plate of the rows, so a critic of rows cannot see it"
                )
            if site is not None and site.role == "latent" and name not in structure.guide:
                raise ProbgenError(
                    f"Adversarial: the critic sees the latent {name!r}, which has no real draws: let the guide draw it"
                )
            own = structure.guide.get(name)
            told = site is not None and (
                site.parents or self.sites == (name,)
            )  # a prior of labels has no need to learn
            for drawn in ([site] if told else []) + ([own] if own is not None else []):
                if not drawn.reparametrised:
                    raise ProbgenError(
                        f"Adversarial: the draws of {name!r} ({drawn.family}) are not reparametrised, so no gradient goes through "
                        "them: let a Delta or a Normal stand around what the network says"
                    )

    def picked(self, nodes: Mapping[str, Any], arrays: Mapping[str, Any]) -> tuple[Any, ...]:
        """The values of the sites in a trace, or of arrays that are given."""
        for name in self.sites:
            if name not in nodes and name not in arrays:
                raise ProbgenError(f"Adversarial: the program has no site or array {name!r} for the critic to see")
        return tuple(nodes[name]["value"] if name in nodes else arrays[name] for name in self.sites)

    def moved(self, guide: Mapping[str, Any]) -> bool:
        """Whether the program has a hand in the real rows, by draws of its guide."""
        return any(name in guide for name in self.sites)


def refuse_one_name(losses: Iterable[Any]) -> None:
    """Refuse two critics of one name in a sum: players of one name are one."""
    names = [loss.name for loss in losses if isinstance(loss, Adversary)]
    for name in names:
        if names.count(name) > 1:
            raise ProbgenError(f"two critics are named {name!r}: give one of the Adversarial losses another `name`")


def _several(argument: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, tuple | list):
        raise ProbgenError(f"Adversarial: `{argument}` is {values!r}: give one, or a list of them")
    return tuple(values)


@dataclass(frozen=True)
class Information:
    """The arguments of `MutualInformation`: the latent that the guide finds in draws of the model."""

    site: str = "c"

    needs_guide = False
    validates = False  # the draws that it looks at change with every step

    def check(self, structure: Structure) -> None:
        """The model and the guide both draw it, row by row, and the guide can be shown draws of the data."""
        for name in structure.observed:
            if name not in structure.arrays:
                raise ProbgenError(
                    f"MutualInformation: no array bears the name of the site {name!r}, so the guide cannot be shown its draws: "
                    "name array and site alike"
                )
        if self.site not in structure.latents or self.site not in structure.guide:
            raise ProbgenError(
                f"MutualInformation: {self.site!r} is no latent that model and guide both draw: name one of "
                f"{', '.join(structure.sampled) or 'none'}"
            )
        if not structure.model[self.site].local:
            raise ProbgenError(f"MutualInformation: {self.site!r} lies outside the plate of the rows")
        for name, site in structure.model.items():
            if name != self.site and site.role == "observed" and not site.reparametrised:
                raise ProbgenError(
                    f"MutualInformation: the draws of {name!r} ({site.family}) are not reparametrised, so no gradient goes through "
                    "them: let a Delta or a Normal stand around what the network says"
                )


@dataclass(frozen=True)
class Pair:
    """The arguments of `L1`: a site, and the array or the site that its draws are held against."""

    site: str = "x"
    to: str | None = None

    needs_guide = False

    @property
    def other(self) -> str:
        """What it is held against; the array of its own name unless said."""
        return self.site if self.to is None else self.to

    def check(self, structure: Structure) -> None:
        """Both are there, row by row, and gradients go through the site's draws."""
        site: Site | None = structure.model.get(self.site)
        if site is None or not site.local or not site.reparametrised:
            raise ProbgenError(
                f"L1: {self.site!r} is no site of the model with a reparametrised draw for each row: name one of "
                f"{', '.join(n for n, s in structure.model.items() if s.local and s.reparametrised) or 'none'}"
            )
        if self.other not in structure.arrays and self.other not in structure.model:
            raise ProbgenError(f"L1: there is no array or site {self.other!r} to hold {self.site!r} against")
