// A stand-in for Apple's module of this name: signatures of what is used, for the type checker alone.
@_exported import SwiftUI

public protocol Transferable {}
extension Data: Transferable {}
public struct PHPickerFilter: Sendable {
    public static let images = PHPickerFilter()
    init() {}
}
public struct PhotosPickerItem: Equatable, Hashable, Sendable {
    public func loadTransferable<T: Transferable>(type: T.Type) async throws -> T? { fatalError() }
}
public struct PhotosPicker<Label: View>: Primitive {
    public init(
        selection: Binding<PhotosPickerItem?>, matching filter: PHPickerFilter? = nil, @ViewBuilder label: () -> Label
    ) { fatalError() }
}
