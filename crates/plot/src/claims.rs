//! Whether the paper's claims hold here: judged by the rows of the experiments that say how (see
//! [`minicache_config::Claim`]), model by model.

mod scores;
mod sizes;
mod states;

use minicache_config::{Claim, Needs};

use crate::curves::group;
use crate::data::Data;

/// How a claim fared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It holds here.
    Reproduced,
    /// Part of it holds, or for some of the tasks.
    Partly,
    /// It does not hold here.
    NotReproduced,
    /// The rows cannot tell.
    Open,
}

impl Outcome {
    /// For readers.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Reproduced => "reproduced",
            Self::Partly => "partly reproduced",
            Self::NotReproduced => "not reproduced",
            Self::Open => "cannot be told here",
        }
    }

    /// Of several models. One that cannot tell takes no part, unless none can.
    fn of_models(findings: impl IntoIterator<Item = Self>) -> Self {
        let told: Vec<Self> = findings.into_iter().filter(|o| *o != Self::Open).collect();
        match told.as_slice() {
            [] => Self::Open,
            [first, rest @ ..] if rest.iter().all(|o| o == first) => *first,
            _ => Self::Partly,
        }
    }

    /// Of what is claimed of several things at once: it holds where all of them do.
    fn of_parts(parts: &[Self]) -> Self {
        match Self::of_models(parts.iter().copied()) {
            Self::Reproduced if parts.contains(&Self::Open) => Self::Partly,
            outcome => outcome,
        }
    }
}

/// What the rows of one model say about a claim.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Finding {
    /// The model, for readers.
    pub(crate) model: String,
    /// The figures, with intervals where there are any.
    pub(crate) text: String,
    /// The judgement.
    pub(crate) outcome: Outcome,
    /// What would tell, where the rows cannot.
    pub(crate) wanted: Option<String>,
}

/// A claim with what was found.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Verdict {
    /// The claim.
    pub(crate) claim: Claim,
    /// One for each model with rows that say something of it.
    pub(crate) findings: Vec<Finding>,
}

impl Verdict {
    /// The claim with the paper's figure, and what was found model by model.
    pub(crate) fn sentences(&self) -> String {
        let found: Vec<String> = self.findings.iter().map(|f| format!("{}: {}", f.model, f.text)).collect();
        format!("{} (paper: {}). {}.", self.claim.text, self.claim.paper, found.join(". "))
    }

    /// All models together.
    pub(crate) fn outcome(&self) -> Outcome {
        Outcome::of_models(self.findings.iter().map(|f| f.outcome))
    }
}

/// The claims of an experiment of which its rows say something.
pub(crate) fn of(data: &Data) -> Vec<Verdict> {
    let claims = data.info.iter().flat_map(|info| &info.experiment.claims);
    let models = group(&data.cells, &["model".to_string()], &data.cells.all());
    let verdict = |claim: &Claim| {
        let findings: Vec<Finding> =
            models.iter().filter_map(|rows| finding(data, rows, &claim.needs)).collect();
        (!findings.is_empty()).then(|| Verdict { claim: claim.clone(), findings })
    };
    claims.filter_map(verdict).collect()
}

/// What part of a model's rows say: figures, outcome, and what would tell where they cannot.
struct Part {
    text: String,
    outcome: Outcome,
    wanted: Option<String>,
}

impl Part {
    fn told(text: String, holds: bool) -> Self {
        let outcome = if holds { Outcome::Reproduced } else { Outcome::NotReproduced };
        Self { text, outcome, wanted: None }
    }

    /// Told where it holds or fails; else open, with what would tell.
    fn judged(text: String, holds: bool, fails: bool, wanted: impl FnOnce() -> Option<String>) -> Self {
        if holds || fails {
            return Self::told(text, holds);
        }
        Self { text, outcome: Outcome::Open, wanted: wanted() }
    }
}

fn finding(data: &Data, rows: &[usize], needs: &Needs) -> Option<Finding> {
    let parts = match needs {
        Needs::Similar { least } => states::similar(data, rows, *least),
        Needs::FirstApart { least } => states::first_apart(data, rows, *least),
        Needs::Kept { which, within, mean } => scores::kept(data, rows, which, *within, *mean),
        Needs::Lost { which, mean } => scores::lost(data, rows, which, *mean),
        Needs::Ahead { which, of, mean } => scores::ahead(data, rows, which, of, *mean),
        Needs::Best { variant, key, value } => scores::best(data, rows, variant, key, *value),
        Needs::Ratio { variant, least, models } => sizes::ratio(data, rows, variant, *least, models),
        Needs::Times { variant, column, least } => sizes::times(data, rows, variant, column, *least),
        Needs::Less { variant, column, share } => sizes::less(data, rows, variant, column, *share),
    };
    let model = data.model_label(data.cells.text(*rows.first()?, "model")).to_string();
    (!parts.is_empty()).then(|| Finding {
        model,
        text: parts.iter().map(|p| p.text.as_str()).collect::<Vec<_>>().join("; "),
        outcome: Outcome::of_parts(&parts.iter().map(|p| p.outcome).collect::<Vec<_>>()),
        wanted: parts.iter().find_map(|p| p.wanted.clone()),
    })
}

/// The smallest and the largest, where there are any.
fn range(values: &[f64]) -> Option<(f64, f64)> {
    let low = values.iter().copied().reduce(f64::min)?;
    Some((low, values.iter().copied().reduce(f64::max)?))
}
