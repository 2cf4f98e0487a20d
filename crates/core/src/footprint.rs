//! Bytes held, by part.

/// Bytes that a cache really holds, counted from its allocations (capacity, not length), by part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Footprint {
    /// States stored per layer: exact, or the codes of quantised ones.
    pub states: usize,
    /// Shared directions (or means) of merged pairs, or the codes of quantised ones.
    pub directions: usize,
    /// Magnitudes of merged states.
    pub magnitudes: usize,
    /// Retained tokens of merged pairs and exact first tokens, with their positions.
    pub retained: usize,
    /// Newest tokens in full precision.
    pub residual: usize,
    /// Scales and zeros of quantised numbers.
    pub scales: usize,
    /// Cross-layer latents, or the codes of quantised ones.
    pub latents: usize,
    /// What a method keeps besides states (attention statistics, smoothing factors, indices, the
    /// vectors by which a factored prompt is restored).
    pub state: usize,
}

impl Footprint {
    /// All parts together.
    pub fn total(&self) -> usize {
        self.parts().iter().fold(0, |sum: usize, (_, bytes)| sum.saturating_add(*bytes))
    }

    /// The footprint of `n` alike; what is beyond the largest number stays there.
    #[must_use]
    pub fn times(&self, n: usize) -> Self {
        let times = |bytes: usize| bytes.saturating_mul(n);
        Self {
            states: times(self.states),
            directions: times(self.directions),
            magnitudes: times(self.magnitudes),
            retained: times(self.retained),
            residual: times(self.residual),
            scales: times(self.scales),
            latents: times(self.latents),
            state: times(self.state),
        }
    }

    /// Parts by name, in a fixed order.
    pub fn parts(&self) -> [(&'static str, usize); 8] {
        [
            ("states", self.states),
            ("directions", self.directions),
            ("magnitudes", self.magnitudes),
            ("retained", self.retained),
            ("residual", self.residual),
            ("scales", self.scales),
            ("latents", self.latents),
            ("state", self.state),
        ]
    }
}

impl std::ops::AddAssign for Footprint {
    fn add_assign(&mut self, other: Self) {
        self.states += other.states;
        self.directions += other.directions;
        self.magnitudes += other.magnitudes;
        self.retained += other.retained;
        self.residual += other.residual;
        self.scales += other.scales;
        self.latents += other.latents;
        self.state += other.state;
    }
}
