//! `verdict.md`: what came of every claim of the paper, over all experiments.

use std::fmt::Write;

use crate::claims::{Outcome, Verdict};
use crate::report::Report;
use crate::views::{Heading, Value, View};

/// What others found. Nothing here is computed: it is what their papers and repositories say.
const OTHERS: &str = include_str!("../assets/others.md");

/// How the table is to be read.
const ABOUT: &str = "A score is kept where the 95 % interval of its difference from the full cache (paired bootstrap on \
the same samples) lies above what may be lost, and lost where all of it lies below. Differences of scores are in \
points of 100. What neither holds of cannot be told here.";

/// The claims of which something can be said, with the experiments that say it.
pub(crate) fn all(reports: &[Report]) -> Vec<(&str, &Verdict)> {
    reports.iter().flat_map(|r| r.verdicts.iter().map(|v| (r.data.id.as_str(), v))).collect()
}

/// One row for each claim: the paper's figure, every model's, the judgement.
pub(crate) fn table(verdicts: &[(&str, &Verdict)]) -> View {
    let mut models: Vec<&str> = Vec::new();
    for finding in verdicts.iter().flat_map(|(_, v)| &v.findings) {
        if !models.contains(&finding.model.as_str()) {
            models.push(&finding.model);
        }
    }
    let heading = |label: &str| Heading { label: label.to_string(), numeric: false };
    let value = |text: String| Value { text, sort: None };
    let ends = [heading("experiment"), heading("here")];
    let columns = [heading("claim"), heading("the paper")]
        .into_iter()
        .chain(models.iter().map(|m| heading(m)))
        .chain(ends)
        .collect();
    let row = |(id, verdict): &(&str, &Verdict)| {
        let finding = |model: &&str| {
            let found = verdict.findings.iter().find(|f| f.model == **model);
            value(found.map_or(String::new(), |f| format!("{} ({})", f.text, f.outcome.label())))
        };
        let ends = [value((*id).to_string()), value(verdict.outcome().label().to_string())];
        let claim = [value(verdict.claim.text.clone()), value(verdict.claim.paper.clone())];
        claim.into_iter().chain(models.iter().map(finding)).chain(ends).collect()
    };
    let (title, caption) = ("The claims of the paper".to_string(), ABOUT.to_string());
    View { title, caption, columns, rows: verdicts.iter().map(row).collect() }
}

/// How many claims came to what.
pub(crate) fn summary(verdicts: &[(&str, &Verdict)]) -> String {
    let outcomes = [Outcome::Reproduced, Outcome::Partly, Outcome::NotReproduced, Outcome::Open];
    let count = |outcome: &Outcome| verdicts.iter().filter(|(_, v)| v.outcome() == *outcome).count();
    let parts = outcomes.iter().map(|o| (count(o), o)).filter(|(n, _)| *n > 0);
    let parts: Vec<String> = parts.map(|(n, o)| format!("{n} {}", o.label())).collect();
    format!("Of {} claims of the paper: {}.", verdicts.len(), parts.join(", "))
}

/// What would tell where the rows cannot, one sentence for each claim and model.
pub(crate) fn wanted(verdicts: &[(&str, &Verdict)]) -> Vec<String> {
    let mut out = Vec::new();
    for (id, verdict) in verdicts {
        for finding in &verdict.findings {
            if let Some(wanted) = &finding.wanted {
                out.push(format!("`{id}`, {}, {}: {wanted}.", finding.model, verdict.claim.text));
            }
        }
    }
    out
}

/// The page; `None` where no claim was judged.
pub(crate) fn markdown(reports: &[Report]) -> Option<String> {
    let verdicts = all(reports);
    if verdicts.is_empty() {
        return None;
    }
    let mut out = format!("# What came of the paper's claims\n\n{}\n", summary(&verdicts));
    crate::markdown::table(&mut out, &table(&verdicts));
    let wanted = wanted(&verdicts);
    if !wanted.is_empty() {
        out += "\n## What would tell\n\n";
        wanted.iter().for_each(|line| out += &format!("* {line}\n"));
    }
    let fronts: Vec<&str> = reports.iter().filter_map(|r| r.front.as_deref()).collect();
    if !fronts.is_empty() {
        out += "\n## Beside the paper\n\n";
        fronts.iter().for_each(|front| out += &format!("* {front}\n"));
    }
    let _ = write!(out, "\n{}\n\n", OTHERS.trim());
    out += "Made by `minicache report` from the rows in this folder; each experiment's own report has the details.\n";
    Some(out)
}
