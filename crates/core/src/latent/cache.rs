//! The latent cache: see the module's page for the mathematics.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::coded::{Coded, LATE};
use super::plan::{LatentPlan, group_of};
use super::view::{LatentKeys, LatentValues};
use crate::archive::{Archive, damaged};
use crate::cache::{KvCache, Restored};
use crate::settings::ModelShape;
use crate::states::{States, check_in_sight, check_layer, check_truncate};
use crate::store::Side;
use crate::view::{LayerView, Segment};
use crate::{Footprint, Result};

/// See the module.
pub(crate) struct LatentCache {
    plan: Arc<LatentPlan>,
    keys: Vec<Coded>,
    values: Vec<Coded>,
    len: usize,
    step: usize,
}

impl LatentCache {
    pub(crate) fn new(plan: Arc<LatentPlan>) -> Self {
        let (spec, shape) = (&plan.spec, &plan.shape);
        let keys = plan.keys.iter().map(|p| Coded::new(p, Side::Keys, spec, shape)).collect();
        let values = plan.values.iter().map(|p| Coded::new(p, Side::Values, spec, shape)).collect();
        Self { keys, values, plan, len: 0, step: 0 }
    }

    fn view(&self, layer: usize) -> LayerView<'_> {
        let (plans, states) = (&self.plan.keys, &self.keys);
        let g = group_of(plans, layer);
        let within = layer - plans[g].first;
        let latents = LatentKeys { plan: &plans[g], layer: within, stores: &states[g].latents };
        let keys = states[g]
            .view(within, self.len, |positions, first| Segment::latent_keys(positions, latents, first));
        let (plans, states) = (&self.plan.values, &self.values);
        let g = group_of(plans, layer);
        let within = layer - plans[g].first;
        let latents = LatentValues { plan: &plans[g], layer: within, stores: &states[g].latents };
        let values = states[g]
            .view(within, self.len, |positions, first| Segment::latent_values(positions, latents, first));
        LayerView { keys, values }
    }

    /// Turns the states of these groups of keys and of values into latents, of those that are complete.
    fn encode(&mut self, keys: Range<usize>, values: Range<usize>) {
        let plan = &*self.plan;
        let exact = (plan.spec.sinks, plan.spec.residual);
        let kv_dim = plan.shape.kv_dim();
        let (of_keys, of_values) = (&mut self.keys[keys.clone()], &mut self.values[values.clone()]);
        let keys = || {
            let groups =
                of_keys.par_iter_mut().zip(&plan.keys[keys]).filter(|(group, _)| group.is_complete());
            groups.for_each(|(group, plan)| {
                group.take(exact, |set, rows, first, z| {
                    plan.sets[set].transform.encode(rows, kv_dim, first, z);
                });
            });
        };
        let values = || {
            let groups =
                of_values.par_iter_mut().zip(&plan.values[values]).filter(|(group, _)| group.is_complete());
            groups.for_each(|(group, plan)| {
                group.take(exact, |set, rows, _, z| plan.sets[set].transform.encode(rows, kv_dim, z));
            });
        };
        rayon::join(keys, values);
    }

    /// What of a layer the next query sees.
    fn visible(&self, layer: usize) -> Range<usize> {
        self.plan.shape.first_seen(layer, self.len)..self.len
    }
}

impl KvCache for LatentCache {
    fn shape(&self) -> &ModelShape {
        &self.plan.shape
    }

    fn attend_held(&self, layer: usize, states: States<'_>, out: &mut [f32], _: &mut Vec<f32>) -> Result<()> {
        self.view(layer).attend(&self.plan.shape, layer, self.len, states, out);
        Ok(())
    }

    fn store(&mut self, layer: usize, states: States<'_>, _: &[f32]) -> Result<()> {
        self.step = states.tokens(&self.plan.shape);
        let (k, v) = (group_of(&self.plan.keys, layer), group_of(&self.plan.values, layer));
        let complete = [
            self.keys[k].wait(layer - self.plan.keys[k].first, states.k),
            self.values[v].wait(layer - self.plan.values[v].first, states.v),
        ];
        if self.step > LATE && complete.contains(&true) {
            self.encode(k..k + 1, v..v + 1);
        }
        Ok(())
    }

    fn finish_step(&mut self) -> Result<()> {
        self.encode(0..self.keys.len(), 0..self.values.len());
        self.len += std::mem::take(&mut self.step);
        self.plan.phases.extend(self.len);
        let (shape, len) = (self.plan.shape, self.len);
        if shape.window.is_some() {
            let first = |layers: Range<usize>| layers.map(|layer| shape.first_seen(layer, len)).min();
            for (g, plan) in self.keys.iter_mut().zip(&self.plan.keys) {
                g.drop_before(first(plan.first..plan.first + plan.layers).unwrap_or(0));
            }
            for (g, plan) in self.values.iter_mut().zip(&self.plan.values) {
                g.drop_before(first(plan.first..plan.first + plan.layers).unwrap_or(0));
            }
        }
        Ok(())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        let exact = (self.plan.spec.sinks, self.plan.spec.residual);
        let sides = || self.keys.iter().chain(&self.values);
        check_truncate(self.len, len, || {
            check_in_sight(&self.plan.shape, len, |layer| self.view(layer).start())?;
            sides().try_for_each(|side| side.can_truncate(len, exact))
        })?;
        self.keys.iter_mut().chain(&mut self.values).for_each(|side| side.truncate(len));
        self.len = len;
        Ok(())
    }

    fn len(&self) -> usize {
        self.len
    }

    fn footprint(&self) -> Footprint {
        let mut total = Footprint::default();
        self.keys.iter().chain(&self.values).for_each(|g| total += g.footprint());
        total
    }

    fn restored(&self, layer: usize) -> Result<Restored> {
        check_layer(&self.plan.shape, layer)?;
        Ok(self.view(layer).restored(&self.plan.shape, self.visible(layer)))
    }

    fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        archive.count(&mut self.len)?;
        for side in self.keys.iter_mut().chain(&mut self.values) {
            side.archive(archive, self.len)?;
        }
        damaged((0..self.plan.shape.layers).all(|layer| self.view(layer).holds(self.visible(layer))))?;
        self.plan.phases.extend(self.len);
        Ok(())
    }

    fn fork(&self) -> Box<dyn KvCache> {
        Box::new(Self {
            plan: self.plan.clone(),
            keys: self.keys.clone(),
            values: self.values.clone(),
            ..*self
        })
    }
}
