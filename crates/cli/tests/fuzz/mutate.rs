//! Files made of good ones: damaged at random, and damaged where it hurts a format.

use std::io::Write as _;
use std::ops::Range;

use rand::seq::IndexedRandom as _;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng as Dice;
use sha2::{Digest as _, Sha256};

/// No input becomes larger.
const LARGEST: usize = 1 << 20;

/// What is known of a format's structure, beyond bytes and words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Lines, numbers and words.
    Text,
    /// Keys and names with their lengths before them and values behind.
    Gguf,
    /// A JSON header with its length before it.
    Safetensors,
    /// What matters stands at the end, its length last.
    Parquet,
    /// The seed is the text of the one member.
    Zip,
    /// Lines that end in a check of their text (of the cell with the key `key`).
    Checked,
}

/// Good files and what to damage them with.
pub(crate) struct Seeds {
    pub(crate) shape: Shape,
    pub(crate) files: Vec<Vec<u8>>,
    pub(crate) words: &'static [&'static str],
}

/// Words that mean something in JSON, TOML or CSV, and bytes that steer a terminal.
const WORDS: &[&str] = &[
    "NaN",
    "Infinity",
    "-Infinity",
    "nan",
    "inf",
    "null",
    "true",
    "false",
    "\"\"",
    "[]",
    "{}",
    "[[",
    "{\"a\":",
    "\"",
    "'",
    "\\",
    "\"\\ud800\"",
    "\\udc00\\ud800",
    "\\u0000",
    "\\u001b[2J",
    "\u{1b}[2J",
    "\u{feff}",
    "\u{0}",
    "\n",
    "\r\n",
    "\n\n",
    ",",
    ":",
    "=",
    "]",
    "}",
    "[1,2]",
    "\"half\"",
    "\"auto\"",
    "é",
    "中",
    "😀",
    "#",
    "//",
    "..",
    "/",
    "%s",
    "-",
    "+",
    "e",
    ".",
];

const NUMBERS: &[&str] = &[
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "-0",
    "0.0",
    "1.5",
    "-1.5",
    "0.9999999",
    "1e-9",
    "1e-999",
    "1e9",
    "1e18",
    "1e308",
    "1e999",
    "-1e999",
    "NaN",
    "inf",
    "255",
    "256",
    "257",
    "4096",
    "65535",
    "65536",
    "1000000",
    "100000000",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "1099511627776",
    "9007199254740993",
    "9223372036854775807",
    "-9223372036854775808",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "99999999999999999999999999999999999999999999",
    "0x10",
    "1_000",
    "\"5\"",
    "[1]",
    "null",
];

const INTEGERS: &[u64] = &[
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    12,
    16,
    31,
    33,
    64,
    127,
    128,
    255,
    256,
    1000,
    4096,
    32767,
    32768,
    65535,
    65536,
    1 << 20,
    1 << 24,
    i32::MAX as u64,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    1 << 61,
    1 << 62,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 31,
    u64::MAX - 7,
    u64::MAX - 1,
    u64::MAX,
];

const FLOATS: &[f32] = &[
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::MAX,
    f32::MIN_POSITIVE,
    1e-45,
    0.0,
    -0.0,
    -1.0,
    1e30,
    1e-30,
];

/// The dice of one input: the same in every run, on every machine.
pub(crate) fn dice(format: &str, index: u64) -> Dice {
    let hash = Sha256::new().chain_update(format).chain_update(index.to_le_bytes()).finalize();
    Dice::from_seed(hash.into())
}

/// One input, and the number of the seed that it comes from.
pub(crate) fn input(format: &str, seeds: &Seeds, index: u64) -> (usize, Vec<u8>) {
    let dice = &mut dice(format, index);
    let seed = dice.random_range(0..seeds.files.len());
    let mut bytes = seeds.files[seed].clone();
    let raw =
        |bytes: &mut Vec<u8>, dice: &mut Dice| some(dice, |dice| mutate(bytes, 0..usize::MAX, seeds, dice));
    match seeds.shape {
        Shape::Text => raw(&mut bytes, dice),
        Shape::Gguf => some(dice, |dice| gguf(&mut bytes, seeds, dice)),
        Shape::Safetensors if dice.random_bool(0.8) => safetensors(&mut bytes, seeds, dice),
        Shape::Safetensors => some(dice, |dice| mutate(&mut bytes, 0..4096, seeds, dice)),
        Shape::Parquet => some(dice, |dice| parquet(&mut bytes, seeds, dice)),
        Shape::Zip => zip(&mut bytes, seeds, dice),
        Shape::Checked => {
            raw(&mut bytes, dice);
            if dice.random_bool(0.75) {
                bytes = checked(&bytes);
            }
        }
    }
    bytes.truncate(LARGEST);
    (seed, bytes)
}

/// One change as often as several: what is damaged in many places is refused at the first.
fn some(dice: &mut Dice, mut change: impl FnMut(&mut Dice)) {
    let count = [1, 1, 1, 1, 2, 2, 4, 8][dice.random_range(0..8)];
    for _ in 0..count {
        change(dice);
    }
}

/// Changes something that begins in `range`.
fn mutate(bytes: &mut Vec<u8>, range: Range<usize>, seeds: &Seeds, dice: &mut Dice) {
    let (start, end) = (range.start.min(bytes.len()), range.end.min(bytes.len()));
    if start >= end {
        return bytes.extend_from_slice(word(seeds, dice));
    }
    let at = dice.random_range(start..end);
    match dice.random_range(0..14) {
        0 => bytes[at] ^= 1 << dice.random_range(0..8),
        1 => bytes[at] = [0, 0xff, 0x80, 0x7f, b'"', b'\n', b'0', b' '][dice.random_range(0..8)],
        2 => put(bytes, at, &number(dice)),
        3 => bytes.truncate(at),
        4 | 5 => {
            let block = bytes[block(at, bytes.len(), dice)].to_vec();
            let times = if dice.random_bool(0.1) { 1 << dice.random_range(0..14) } else { 1 };
            let times = times.min(LARGEST / 4 / block.len().max(1));
            let to = dice.random_range(start..=end);
            bytes.splice(to..to, block.repeat(times));
        }
        6 => drop(bytes.drain(block(at, bytes.len(), dice))),
        7 => {
            let (from, to) = (block(at, bytes.len(), dice), dice.random_range(start..end));
            let to = to.min(bytes.len() - from.len());
            from.enumerate().for_each(|(i, from)| bytes.swap(from, to + i));
        }
        8 => {
            if let Some(other) = seeds.files.choose(dice) {
                let from = dice.random_range(0..=other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
        9 => {
            let times = if dice.random_bool(0.1) { 1 << dice.random_range(0..16) } else { 1 };
            let word = word(seeds, dice);
            let words = word.repeat(times.min(LARGEST / 4 / word.len().max(1)));
            bytes.splice(at..at, words);
        }
        10 | 11 => {
            // A whole number, wherever it begins behind this place.
            let Some(first) = (at..bytes.len()).find(|&i| bytes[i].is_ascii_digit()) else { return };
            let is_part = |b: &u8| b.is_ascii_digit() || b".eE+-".contains(b);
            let length = bytes[first..].iter().take_while(|b| is_part(b)).count();
            let first = if first > start && bytes[first - 1] == b'-' { first - 1 } else { first };
            bytes.splice(first..(first + length).min(bytes.len()), pick(NUMBERS, dice).bytes());
        }
        _ => {
            // A whole value: what stands between two marks.
            let is_mark = |b: &u8| b":,=[]{}\n|".contains(b);
            let Some(mark) = bytes[at..].iter().position(is_mark) else { return };
            let first = at + mark + 1;
            let length = bytes[first..].iter().position(is_mark).unwrap_or(0);
            let new = if dice.random_bool(0.5) { pick(NUMBERS, dice).as_bytes() } else { word(seeds, dice) };
            bytes.splice(first..first + length, new.iter().copied());
        }
    }
}

fn pick<'a>(from: &[&'a str], dice: &mut Dice) -> &'a str {
    from[dice.random_range(0..from.len())]
}

fn word(seeds: &Seeds, dice: &mut Dice) -> &'static [u8] {
    let own = !seeds.words.is_empty() && dice.random_bool(0.6);
    pick(if own { seeds.words } else { WORDS }, dice).as_bytes()
}

/// From `at` on, more often short than long.
fn block(at: usize, length: usize, dice: &mut Dice) -> Range<usize> {
    let longest = 1 << dice.random_range(0..10);
    at..(at + dice.random_range(1..=longest)).min(length)
}

/// A number as binary files have them.
fn number(dice: &mut Dice) -> Vec<u8> {
    let integer = match dice.random_range(0..4) {
        0 => dice.next_u64() >> dice.random_range(0..64),
        _ => INTEGERS[dice.random_range(0..INTEGERS.len())],
    };
    match dice.random_range(0..5) {
        0 => (integer as u16).to_le_bytes().to_vec(),
        1 => (integer as u32).to_le_bytes().to_vec(),
        2 => FLOATS[dice.random_range(0..FLOATS.len())].to_le_bytes().to_vec(),
        _ => integer.to_le_bytes().to_vec(),
    }
}

/// Overwrites as far as there is something.
fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    bytes.iter_mut().skip(at).zip(new).for_each(|(old, new)| *old = *new);
}

fn find(bytes: &[u8], words: &[u8]) -> Option<usize> {
    bytes.windows(words.len()).position(|w| w == words)
}

/// Changes what stands behind a key or a tensor's name, or the name itself together with its length.
fn gguf(bytes: &mut Vec<u8>, seeds: &Seeds, dice: &mut Dice) {
    const HEADER: usize = 3 << 12;
    let header = &bytes[..bytes.len().min(HEADER)];
    let known = (0..16).find_map(|_| {
        let word = pick(seeds.words, dice);
        Some((find(header, word.as_bytes())?, word.len()))
    });
    match (known, dice.random_range(0..9)) {
        (Some((at, length)), 0..=4) => {
            // Most values are of four bytes, and what follows is to stay as it is.
            let mut number = number(dice);
            if dice.random_bool(0.7) {
                number.truncate(4);
            }
            put(bytes, at + length + 4 * dice.random_range(0..8), &number);
        }
        (Some((at, length)), 5) if at >= 8 => {
            let new = pick(seeds.words, dice);
            bytes.splice(at..at + length, new.bytes());
            put(bytes, at - 8, &(new.len() as u64).to_le_bytes());
            // What is longer before the data may not leave too little of it.
            bytes.extend([0; 64]);
        }
        (_, 6) => {
            let at = dice.random_range(0..=bytes.len());
            put(bytes, at, &number(dice));
        }
        (_, 7) => mutate(bytes, 0..usize::MAX, seeds, dice),
        _ => mutate(bytes, 0..HEADER, seeds, dice),
    }
}

/// Changes the header and makes its length right again; the numbers now and then.
fn safetensors(bytes: &mut Vec<u8>, seeds: &Seeds, dice: &mut Dice) {
    let length = bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    let Some(mut header) = bytes.get(8..8 + length as usize).map(<[u8]>::to_vec) else { return };
    let mut data = bytes.split_off(8 + header.len());
    if dice.random_bool(0.8) {
        some(dice, |dice| mutate(&mut header, 0..usize::MAX, seeds, dice));
    }
    if dice.random_bool(0.3) && !data.is_empty() {
        let at = dice.random_range(0..data.len()) / 4 * 4;
        put(&mut data, at, &number(dice));
    }
    *bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut header);
    bytes.append(&mut data);
}

/// Changes the footer, more often than the pages.
fn parquet(bytes: &mut Vec<u8>, seeds: &Seeds, dice: &mut Dice) {
    let end = bytes.len().saturating_sub(8);
    let footer = bytes.get(end..end + 4).and_then(<[u8]>::first_chunk).map_or(0, |b| u32::from_le_bytes(*b));
    let start = end.saturating_sub(footer as usize);
    match dice.random_range(0..8) {
        0..=4 if start < end => {
            let at = dice.random_range(start..end);
            // Numbers are written in seven bits a byte here.
            let long = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
            match dice.random_range(0..4) {
                0 => bytes[at] = dice.random(),
                1 => bytes[at] ^= 1 << dice.random_range(0..8),
                2 => put(bytes, at, &long[dice.random_range(0..9)..]),
                _ => bytes[at] = bytes[at].wrapping_add(dice.random_range(0..4)).wrapping_sub(2),
            }
        }
        5 => mutate(bytes, start..usize::MAX, seeds, dice),
        _ => mutate(bytes, 0..usize::MAX, seeds, dice),
    }
}

/// Changes the text, then the archive around it: its directory more often than the rest.
fn zip(bytes: &mut Vec<u8>, seeds: &Seeds, dice: &mut Dice) {
    if dice.random_bool(0.5) {
        some(dice, |dice| mutate(bytes, 0..usize::MAX, seeds, dice));
    }
    let packed = [zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated][dice.random_range(0..2)];
    let options = zip::write::SimpleFileOptions::default().compression_method(packed);
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    archive.start_file("m", options).unwrap();
    archive.write_all(bytes).unwrap();
    *bytes = archive.finish().unwrap().into_inner();
    if dice.random_bool(0.8) {
        some(dice, |dice| {
            let directory = bytes.len().saturating_sub(80)..usize::MAX;
            let range = [directory, 0..40, 0..usize::MAX].choose(dice).cloned().unwrap_or(0..40);
            mutate(bytes, range, seeds, dice);
        });
    }
}

/// Gives every line that had a check the right one for its text.
pub(crate) fn checked(bytes: &[u8]) -> Vec<u8> {
    const SUM: &[u8] = b",\"sum\":\"";
    let line = |line: &[u8]| {
        let end = line.windows(SUM.len()).rposition(|w| w == SUM).unwrap_or(line.len());
        let hash = Sha256::new().chain_update("key").chain_update(&line[..end]).finalize();
        let sum: String = hash.iter().take(8).map(|b| format!("{b:02x}")).collect();
        [&line[..end], SUM, sum.as_bytes(), b"\"}\n"].concat()
    };
    bytes.split(|&b| b == b'\n').filter(|l| !l.is_empty()).flat_map(line).collect()
}

/// The first `count` lines.
pub(crate) fn lines(text: &str, count: usize) -> Vec<u8> {
    text.split_inclusive('\n').take(count).collect::<String>().into_bytes()
}
