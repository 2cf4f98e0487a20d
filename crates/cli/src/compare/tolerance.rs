//! How far the values of one cell may be apart in two results folders.

use std::fmt;

use minicache_config::columns::{Role, role, spread_of};
use minicache_eval::store::Row;

/// What is asked of two values of a column.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Rule {
    /// Nothing: they are of the machine and the moment, or of one answer.
    Free,
    /// The same text.
    Exact,
    /// Numbers at most `absolute` apart, or `relative` of the larger one, whichever is more.
    Within { absolute: f64, relative: f64 },
}

const fn within(absolute: f64, relative: f64) -> Rule {
    Rule::Within { absolute, relative }
}

/// With the same instructions on the same processor results are the same whenever a run is repeated, up to the last of the
/// six digits that are printed and to what is zero but for rounding.
const REPEATED: Rule = within(1e-6, 1e-5);

/// With other instructions, or on another processor, sums are rounded otherwise, and 8-bit activations and codes of few
/// bits make more of it: what AVX2 and AVX-512 differ by on SmolLM2-135M (see the README's limits), with a margin for other
/// texts. A spread is of few samples, so that one of them moves it further than the mean.
const OTHER_INSTRUCTIONS: &[(&str, Rule)] = &[
    ("perplexity_full", within(0.0, 0.005)),
    ("perplexity", within(0.0, 0.05)),
    ("kl", within(1e-4, 0.15)),
    ("kl_std", within(1e-4, 0.3)),
    ("agreement", within(0.06, 0.0)),
    ("agreement_std", within(0.06, 0.0)),
];

/// Cosines and CKA of states, over hundreds of tokens: no codes are involved.
const OTHERWISE: Rule = within(1e-3, 1e-3);

/// Shares of retained tokens differ with the lengths of answers.
const RATIO_OF_ANSWERS: Rule = within(0.0, 0.05);

/// What is asked of the column in the two rows; `same` says that the same instructions of the same processor made both.
pub(super) fn rule(column: &str, rows: [&Row; 2], same: bool) -> Rule {
    let answers = rows.iter().all(|row| number(row, "score").is_some());
    match role(column) {
        // A variant may have been renamed: what a cell is, its key says.
        Role::Name | Role::Place | Role::Internal | Role::Timing => Rule::Free,
        Role::Count if same => Rule::Exact,
        Role::Metric if same => REPEATED,
        _ if answers => of_answers(column, rows),
        Role::Count => Rule::Exact,
        Role::Metric => {
            let listed = |name: &str| OTHER_INSTRUCTIONS.iter().find(|(c, _)| *c == name).map(|(_, r)| *r);
            listed(column).or_else(|| listed(spread_of(column)?)).unwrap_or(OTHERWISE)
        }
    }
}

/// One token that comes out otherwise changes the rest of an answer, its length and so the bytes at its end. What stands
/// is the score: one answer may be another, or as many as the scores' own 95 % intervals allow.
fn of_answers(column: &str, rows: [&Row; 2]) -> Rule {
    match column {
        "samples" => Rule::Exact,
        "ratio" => RATIO_OF_ANSWERS,
        "score" => {
            let half = |row| Some((number(row, "score_hi")? - number(row, "score_lo")?) / 2.0);
            let intervals: f64 = rows.iter().filter_map(|row| half(row)).sum();
            let most = rows.iter().filter_map(|row| number(row, "score_hi").or(number(row, "score")));
            // LongBench's and BLEU's scores are of 100, the others of 1.
            let full = if most.fold(0.0, f64::max) > 1.0 { 100.0 } else { 1.0 };
            let one = full / number(rows[0], "samples").unwrap_or(1.0).max(1.0);
            within(intervals.max(one), 0.0)
        }
        _ => Rule::Free,
    }
}

fn number(row: &Row, column: &str) -> Option<f64> {
    row.get(column)?.parse().ok()
}

impl Rule {
    /// Whether two values are as they are asked to be. One that is missing is not.
    pub(super) fn holds(self, a: &str, b: &str) -> bool {
        match (self, a.parse::<f64>(), b.parse::<f64>()) {
            (Rule::Free, ..) => true,
            (Rule::Within { absolute, relative }, Ok(x), Ok(y)) => {
                // The last printed digits may make a difference of exactly the tolerance a little more.
                let rounding = 1e-9 * x.abs().max(y.abs());
                (x - y).abs() <= absolute.max(relative * x.abs().max(y.abs())) + rounding
            }
            _ => a == b,
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Rule::Free => f.write_str("any"),
            Rule::Exact => f.write_str("equal"),
            Rule::Within { absolute, relative: 0.0 } => write!(f, "within {}", short(absolute)),
            Rule::Within { absolute: 0.0, relative } => write!(f, "within {} %", short(100.0 * relative)),
            Rule::Within { absolute, relative } => {
                write!(f, "within {} % or {}", short(100.0 * relative), short(absolute))
            }
        }
    }
}

/// Three digits at most.
fn short(x: f64) -> f64 {
    format!("{x:.2e}").parse().unwrap_or(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[(&str, &str)]) -> Row {
        cells.iter().map(|(c, v)| ((*c).to_string(), (*v).to_string())).collect()
    }

    #[test]
    fn repeated_runs_are_held_to_what_is_printed() {
        let none = row(&[]);
        let rule = |column| rule(column, [&none, &none], true);
        assert_eq!(
            (rule("bytes"), rule("arithmetic"), rule("seconds")),
            (Rule::Exact, Rule::Exact, Rule::Free)
        );
        assert!(rule("kl").holds("0.0559403", "0.0559404") && !rule("kl").holds("0.0559403", "0.05595"));
        assert!(!rule("kl").holds("0.1", "") && rule("kl").holds("", ""));
        assert_eq!(rule("kl").to_string(), "within 0.001 % or 0.000001");
    }

    #[test]
    fn other_instructions_are_given_what_they_need() {
        let none = row(&[]);
        let rule = |column| rule(column, [&none, &none], false);
        assert!(rule("kl").holds("0.100", "0.115") && !rule("kl").holds("0.100", "0.12"));
        assert!(
            rule("perplexity_full").holds("9.14", "9.16") && !rule("perplexity_full").holds("9.14", "9.2")
        );
        assert_eq!((rule("bytes"), rule("ratio"), rule("cka_std")), (Rule::Exact, Rule::Exact, OTHERWISE));
    }

    #[test]
    fn scores_are_held_to_their_intervals_or_one_answer() {
        let wide = row(&[("score", "27"), ("score_lo", "14"), ("score_hi", "44"), ("samples", "8")]);
        let few = row(&[("score", "0.5"), ("score_lo", "0.5"), ("score_hi", "0.5"), ("samples", "4")]);
        assert_eq!(rule("score", [&wide, &wide], false), within(30.0, 0.0));
        assert_eq!(rule("score", [&few, &few], false), within(0.25, 0.0));
        assert_eq!(rule("score", [&few, &few], true), REPEATED);
        assert_eq!(rule("tokens", [&few, &few], false), Rule::Free);
        assert_eq!(rule("samples", [&few, &few], false), Rule::Exact);
    }
}
