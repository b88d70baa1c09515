//! Layers on their way to the node's memory: reported in order, each as soon as it stands there.

use std::collections::VecDeque;

use millrace_kernels::cuda;
use millrace_kernels::slab::{SeizedCell, SharedCell};

use crate::ModelError;

/// Cells on their way between the two places where they are kept, locked until they have landed.
pub(super) enum Landing {
    Device(cuda::Landing),
    /// Copied already. The locks are held as a device holds them, and as long as can be, so that tests see what that does to others.
    Here {
        written: Vec<SeizedCell>,
        _read: Vec<SharedCell>,
    },
}

impl Landing {
    /// Of no cell.
    pub(super) fn nothing() -> Self {
        Self::Here { written: Vec::new(), _read: Vec::new() }
    }

    fn done(&self) -> bool {
        match self {
            Self::Device(landing) => landing.done(),
            Self::Here { written, .. } => written.is_empty(),
        }
    }

    /// Waits until they stand.
    pub(super) fn wait(&self) -> Result<(), ModelError> {
        match self {
            Self::Device(landing) => Ok(landing.wait()?),
            Self::Here { .. } => Ok(()),
        }
    }
}

/// Layers of one step that are not reported yet.
#[derive(Default)]
pub(super) struct Spills {
    waiting: VecDeque<Landing>,
    /// Layers reported.
    reported: u16,
}

impl Spills {
    /// Adds the next layer.
    pub(super) fn push(&mut self, landing: Landing) {
        self.waiting.push_back(landing);
    }

    /// Reports what stands by now.
    pub(super) fn report(&mut self, on_layer: &mut dyn FnMut(u16)) {
        while self.waiting.front().is_some_and(Landing::done) {
            self.next(on_layer);
        }
    }

    /// Waits for all and reports them.
    pub(super) fn wait(&mut self, on_layer: &mut dyn FnMut(u16)) -> Result<(), ModelError> {
        while let Some(landing) = self.waiting.front() {
            landing.wait()?;
            self.next(on_layer);
        }
        Ok(())
    }

    /// The cells are free before anybody hears of them.
    fn next(&mut self, on_layer: &mut dyn FnMut(u16)) {
        drop(self.waiting.pop_front());
        on_layer(self.reported);
        self.reported += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_reported_once_and_in_order() {
        let slab = millrace_kernels::KvSlab::new(64, 1, 1).unwrap();
        let (mut spills, mut told) = (Spills::default(), Vec::new());
        spills.report(&mut |_| panic!("there is none"));
        spills.push(Landing::nothing());
        spills.push(Landing::Here { written: vec![slab.seize(0, 0)], _read: vec![] });
        spills.push(Landing::nothing());
        spills.report(&mut |layer| told.push(layer));
        assert_eq!(told, [0], "the second is on its way, and the third behind it");
        assert!(slab.try_write(0, 0).is_none());
        spills.wait(&mut |layer| told.push(layer)).unwrap();
        assert!(slab.try_write(0, 0).is_some());
        assert_eq!(told, [0, 1, 2]);
    }
}
