// A stand-in for Apple's module of this name: signatures of what is used, for the type checker alone.
@_exported import SwiftUI

@MainActor public protocol ChartContent {}
public protocol Plottable {}
extension Double: Plottable {}
extension String: Plottable {}
public struct PlottableValue<Value: Plottable> {
    public static func value(_ label: some StringProtocol, _ value: Value) -> PlottableValue<Value> { fatalError() }
}
@resultBuilder public struct ChartContentBuilder {
    public static func buildBlock<C: ChartContent>(_ content: C) -> C { content }
}
public struct BarMark: ChartContent {
    public init<X: Plottable, Y: Plottable>(x: PlottableValue<X>, y: PlottableValue<Y>) { fatalError() }
}
public struct Chart<Content: ChartContent>: Primitive {
    public init<Data: RandomAccessCollection>(
        _ data: Data, @ChartContentBuilder content: @escaping (Data.Element) -> Content
    ) where Data.Element: Identifiable { fatalError() }
}
