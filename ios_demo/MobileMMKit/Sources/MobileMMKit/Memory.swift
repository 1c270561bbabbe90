import Foundation

#if canImport(os)
    import os
#endif

/// What the system lets this app still take.
public enum Memory {
    /// Bytes; nil where the system sets an app no limit of its own.
    public static var available: Int? {
        #if canImport(os) && !os(macOS)
            let bytes = os_proc_available_memory()
            return bytes > 0 ? bytes : nil
        #else
            return nil
        #endif
    }

    /// Below this, what can be computed again had better be given back.
    private static let low = 200 << 20

    public static var isLow: Bool { available.map { $0 < low } ?? false }

    /// Whether all of a bundle's parts may stay loaded at once: by the memory that they took when they were measured.
    public static func isPlenty(for bundle: ModelBundle) -> Bool {
        guard let available else { return true }
        return bundle.manifest.parts.values.reduce(0) { $0 + $1.peakMemory } + low < available
    }
}
