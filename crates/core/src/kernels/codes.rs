//! How codes lie in a strip.
//!
//! Steps are taken in fours. One *vector* has a byte for each lane and each step of a four, so that a byte dot product
//! sums a four into its lane. Codes below 8 bits put several fours into the same bytes: four q of a plane of b bits
//! lies in vector `q / (8/b)`, shifted left by `b * (q % (8/b))`. Three bits are a plane of two bits, then one of the
//! third bit.

/// The planes of a code: bits, and their place in the code.
fn planes(bits: u8) -> &'static [(usize, usize)] {
    match bits {
        1 => &[(1, 0)],
        2 => &[(2, 0)],
        3 => &[(2, 0), (1, 2)],
        4 => &[(4, 0)],
        _ => &[(8, 0)],
    }
}

/// Bytes of one plane.
fn plane_bytes(plane: usize, steps: usize, width: usize) -> usize {
    steps.div_ceil(4).div_ceil(8 / plane) * 4 * width
}

/// Bytes of a strip of `steps` by `width` codes.
pub(crate) fn strip_bytes(bits: u8, steps: usize, width: usize) -> usize {
    planes(bits).iter().map(|&(plane, _)| plane_bytes(plane, steps, width)).sum()
}

/// Byte within its plane, and shift within the byte, of a code.
fn place(plane: usize, width: usize, step: usize, lane: usize) -> (usize, usize) {
    let per = 8 / plane;
    let four = step / 4;
    ((four / per * width + lane) * 4 + step % 4, four % per * plane)
}

/// Writes the codes of one step into a strip, a lane each.
pub(crate) fn put_step(strip: &mut [u8], bits: u8, steps: usize, step: usize, codes: &[u8]) {
    let width = codes.len();
    let mut start = 0;
    for &(plane, low) in planes(bits) {
        let (first, shift) = place(plane, width, step, 0);
        let mask = 0xff_u8 >> (8 - plane);
        let bytes = &mut strip[start + first..];
        for (fours, &code) in bytes.chunks_mut(4).zip(codes) {
            fours[0] = fours[0] & !(mask << shift) | (code >> low & mask) << shift;
        }
        start += plane_bytes(plane, steps, width);
    }
}

/// Writes the codes of one lane into a strip of `width`, a step each, from the first step on.
pub(crate) fn put_lane(
    strip: &mut [u8],
    bits: u8,
    (steps, width): (usize, usize),
    lane: usize,
    codes: &[u8],
) {
    let mut start = 0;
    for &(plane, low) in planes(bits) {
        let mask = 0xff_u8 >> (8 - plane);
        for (four, codes) in codes.chunks(4).enumerate() {
            let (first, shift) = place(plane, width, 4 * four, lane);
            for (byte, &code) in strip[start + first..].iter_mut().zip(codes) {
                *byte = *byte & !(mask << shift) | (code >> low & mask) << shift;
            }
        }
        start += plane_bytes(plane, steps, width);
    }
}

/// Reads the code at (step, lane) of a strip.
pub(crate) fn get_code(
    strip: &[u8],
    bits: u8,
    (steps, width): (usize, usize),
    (step, lane): (usize, usize),
) -> u8 {
    let mut start = 0;
    let mut code = 0;
    for &(plane, low) in planes(bits) {
        let (byte, shift) = place(plane, width, step, lane);
        code |= (strip[start + byte] >> shift & (0xff >> (8 - plane))) << low;
        start += plane_bytes(plane, steps, width);
    }
    code
}
