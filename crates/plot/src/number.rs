//! Numbers for readers, and the ticks of an axis.

/// `x` with `digits` significant digits, without an exponent where it can be avoided and without trailing zeros
/// that say nothing.
pub(crate) fn significant(x: f64, digits: usize) -> String {
    if x == 0.0 {
        return "0".into();
    }
    let magnitude = x.abs().log10().floor() as i32;
    if !(-5..7).contains(&magnitude) {
        return exponent(x, digits);
    }
    let decimals = (digits as i32 - 1 - magnitude).max(0) as usize;
    let text = format!("{x:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}

fn exponent(x: f64, digits: usize) -> String {
    let text = format!("{:.*e}", digits.saturating_sub(1), x);
    let (mantissa, power) = text.split_once('e').unwrap_or((&text, "0"));
    let mantissa =
        if mantissa.contains('.') { mantissa.trim_end_matches('0').trim_end_matches('.') } else { mantissa };
    let power = superscript(power.parse().unwrap_or(0));
    if mantissa == "1" { format!("10{power}") } else { format!("{mantissa}·10{power}") }
}

fn superscript(n: i32) -> String {
    n.to_string().chars().map(|c| if c == '-' { '⁻' } else { raised(c) }).collect()
}

fn raised(digit: char) -> char {
    let n = digit.to_digit(10).unwrap_or(0) as usize;
    ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'][n]
}

/// Bytes with a binary unit: `93.1 MiB`.
pub(crate) fn bytes(x: f64) -> String {
    let (divisor, unit) = byte_unit(x);
    format!("{} {unit}", significant(x / divisor, 3))
}

/// The binary unit in which `x` bytes read best, and its size.
pub(crate) fn byte_unit(x: f64) -> (f64, &'static str) {
    let units = [(1024f64.powi(3), "GiB"), (1024f64.powi(2), "MiB"), (1024.0, "KiB")];
    units.into_iter().find(|(size, _)| x.abs() >= *size).unwrap_or((1.0, "B"))
}

/// A tick of an axis: where, and what is written there.
pub(crate) type Tick = (f64, String);

/// About `count` round ticks within `low..=high`.
pub(crate) fn linear_ticks(low: f64, high: f64, count: usize) -> Vec<Tick> {
    let span = high - low;
    if !(span > f64::MIN_POSITIVE / f64::EPSILON && span.is_finite()) {
        return vec![(low, significant(low, 4))];
    }
    let raw = span / count.max(1) as f64;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= raw * 0.85);
    let step = step.unwrap_or(10.0 * power);
    let decimals = decimals_of(step);
    let first = (low / step - 1e-9).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    let tick = |i: i64| {
        let x = i as f64 * step;
        (x, tick_text(x, decimals))
    };
    (first..=last).map(tick).collect()
}

/// Ticks of a logarithmic axis: decades, with 2 and 5 between them where they are few.
pub(crate) fn log_ticks(low: f64, high: f64) -> Vec<Tick> {
    let decades = high.log10() - low.log10();
    // What has no logarithm would count as a range of powers as long as the integers.
    if !decades.is_finite() {
        return Vec::new();
    }
    if decades < 0.6 {
        return linear_ticks(low, high, 5);
    }
    let steps: &[f64] = match decades {
        d if d <= 1.2 => &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
        d if d <= 2.2 => &[1.0, 2.0, 5.0],
        _ => &[1.0],
    };
    let every = (decades / 7.0).ceil().max(1.0) as i32;
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let mut out = Vec::new();
    for power in (first..=last).filter(|p| p.rem_euclid(every) == 0) {
        for step in steps {
            let x = step * 10f64.powi(power);
            if x >= low * 0.999 && x <= high * 1.001 {
                out.push((x, significant(x, 3)));
            }
        }
    }
    out
}

fn decimals_of(step: f64) -> usize {
    (0..12).find(|d| (step * 10f64.powi(*d) - (step * 10f64.powi(*d)).round()).abs() < 1e-6).unwrap_or(12)
        as usize
}

fn tick_text(x: f64, decimals: usize) -> String {
    if x.abs() >= 1e6 {
        return exponent(x, 3);
    }
    if x.abs() >= 1e4 && decimals == 0 && (x % 1000.0).abs() < 0.5 {
        return format!("{}k", (x / 1000.0).round()).replace('-', "\u{2212}");
    }
    let text = format!("{x:.decimals$}");
    let zero = text.trim_start_matches('-').chars().all(|c| "0.".contains(c));
    if zero { "0".into() } else { text.replace('-', "\u{2212}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn significant_digits() {
        let shown = [0.0, 1.0, 14.968, 0.87654, 0.00004, 1234.5, 1e9, -0.5].map(|x| significant(x, 3));
        assert_eq!(shown, ["0", "1", "15", "0.877", "0.00004", "1234", "10⁹", "-0.5"]);
    }

    #[test]
    fn sizes() {
        assert_eq!(bytes(512.0), "512 B");
        assert_eq!(bytes(1.5 * 1024.0 * 1024.0), "1.5 MiB");
    }

    #[test]
    fn round_ticks() {
        let texts = |t: Vec<Tick>| t.into_iter().map(|(_, s)| s).collect::<Vec<_>>();
        assert_eq!(texts(linear_ticks(0.0, 1.0, 5)), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(texts(linear_ticks(-0.19, 0.18, 4)), ["−0.1", "0", "0.1"]);
        assert_eq!(texts(log_ticks(0.001, 1.0)), ["0.001", "0.01", "0.1", "1"]);
        assert_eq!(texts(log_ticks(1.0, 8.0)), ["1", "1.5", "2", "3", "5", "7"]);
        for (low, high) in [(0.0, 1.0), (1.0, f64::INFINITY), (f64::NAN, 1.0), (-1.0, 1.0)] {
            assert_eq!(log_ticks(low, high), []);
        }
        assert!((2..=9).contains(&log_ticks(5e-324, f64::MAX).len()));
        assert_eq!(texts(linear_ticks(3.0, 3.0, 5)), ["3"]);
    }
}
