//! Python's `difflib.SequenceMatcher` and `fuzzywuzzy.fuzz.ratio` on top of it.
//!
//! LongBench's code tasks are scored with `fuzz.ratio`. With `python-Levenshtein` installed that function gives other
//! numbers (about two points more); the published ones are `difflib`'s.

use std::collections::HashMap;

use super::python::round_half_even;

/// `SequenceMatcher(None, a, b).ratio()`: 2 M / T, where M counts the characters in matching blocks and T all
/// characters of both. In a `b` of 200 characters or more, those that make up over 1 % of it start no match
/// (`autojunk`).
pub fn ratio(a: &str, b: &str) -> f64 {
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    if a.is_empty() && b.is_empty() {
        return 1.0;
    }
    2.0 * matches(&a, &b) as f64 / (a.len() + b.len()) as f64
}

/// `fuzz.ratio` of fuzzywuzzy 0.18 without python-Levenshtein, in 0..=100.
pub fn fuzz_ratio(a: &str, b: &str) -> u32 {
    if a == b {
        return 100;
    }
    if a.is_empty() || b.is_empty() {
        return 0;
    }
    round_half_even(100.0 * ratio(a, b)) as u32
}

/// The number of characters in all matching blocks.
fn matches(a: &[char], b: &[char]) -> usize {
    let mut positions: HashMap<char, Vec<usize>> = HashMap::new();
    for (j, &c) in b.iter().enumerate() {
        positions.entry(c).or_default().push(j);
    }
    if b.len() >= 200 {
        positions.retain(|_, places| places.len() <= b.len() / 100 + 1);
    }
    let mut total = 0;
    let mut queue = vec![((0, a.len()), (0, b.len()))];
    while let Some((in_a, in_b)) = queue.pop() {
        let (i, j, size) = longest_match(a, b, &positions, in_a, in_b);
        if size == 0 {
            continue;
        }
        total += size;
        queue.push(((in_a.0, i), (in_b.0, j)));
        queue.push(((i + size, in_a.1), (j + size, in_b.1)));
    }
    total
}

/// The longest block `a[i..i+size] == b[j..j+size]` within the bounds, the earliest in `a`, then in `b`; grown at both
/// ends over characters that may start no match.
fn longest_match(
    a: &[char],
    b: &[char],
    positions: &HashMap<char, Vec<usize>>,
    (a_low, a_high): (usize, usize),
    (b_low, b_high): (usize, usize),
) -> (usize, usize, usize) {
    let (mut best_i, mut best_j, mut best) = (a_low, b_low, 0);
    // lengths[j]: length of the match that ends at the previous character of `a` and at b[j].
    let mut lengths: HashMap<usize, usize> = HashMap::new();
    for (i, c) in a.iter().enumerate().take(a_high).skip(a_low) {
        let mut next = HashMap::new();
        let places = positions.get(c).map(Vec::as_slice).unwrap_or_default();
        for &j in places.iter().skip_while(|&&j| j < b_low).take_while(|&&j| j < b_high) {
            let k = j.checked_sub(1).and_then(|j| lengths.get(&j)).copied().unwrap_or(0) + 1;
            next.insert(j, k);
            if k > best {
                (best_i, best_j, best) = (i + 1 - k, j + 1 - k, k);
            }
        }
        lengths = next;
    }
    while best_i > a_low && best_j > b_low && a[best_i - 1] == b[best_j - 1] {
        (best_i, best_j, best) = (best_i - 1, best_j - 1, best + 1);
    }
    while best_i + best < a_high && best_j + best < b_high && a[best_i + best] == b[best_j + best] {
        best += 1;
    }
    (best_i, best_j, best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_cases_of_difflib() {
        assert_eq!(fuzz_ratio("", "abc"), 0);
        assert_eq!(fuzz_ratio("", ""), 100);
        assert!((ratio("abcd", "bcde") - 0.75).abs() < 1e-12);
        // 2 of 16 is 12.5, which Python rounds to the even 12.
        assert_eq!(fuzz_ratio("axxxxxx", "abbbbbbbb"), 12);
    }

    #[test]
    fn popular_characters_start_no_match() {
        // From 200 characters on, those in over 1 % of them start nothing, but a match may grow over them.
        assert!((ratio("xaaay", &"a".repeat(199)) - 6.0 / 204.0).abs() < 1e-12);
        // At the very beginning the empty match grows forwards only if the bounds' first characters agree.
        assert!(ratio("xaaay", &"a".repeat(200)).abs() < 1e-12);
    }
}
